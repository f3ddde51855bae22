"""The server steps along the clients' mean gradient: McMahan et al. 2017, https://arxiv.org/abs/1602.05629."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fl_server_ai.aggregation import (
    STRATEGIES,
    Strategy,
    UpdateMeta,
    sample_weights,
    weighting_field,
)

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class FedSGDOptions:
    """The server's step."""

    lr: float = field(
        default=0.1, metadata={"gt": 0.0, "le": 1000.0, "doc": "Learning rate of the server."}
    )
    weighting: str = weighting_field()


@STRATEGIES.register("FedSGD")
class FedSGD(Strategy[FedSGDOptions]):
    """x' = x - lr sum n_k g_k / sum n_k.

    Clients send gradients in the place of weights (kind `gradient`), under the names of the float tensors; one
    that is left out is zero. Integer buffers may be sent, then they are averaged; else they stay, and so do
    running means and variances, whatever is sent for them. A stale gradient counts as it was sent, with its staleness weight.
    """

    Options = FedSGDOptions
    paper = "1602.05629"
    takes = "gradient"

    def weights(self, metas: Sequence[UpdateMeta], gram: "Tensor | None") -> Sequence[float]:
        return sample_weights(metas, self.options.weighting)

    def update(self, x: "Tensor", y: "Tensor", state: "dict[str, Tensor]") -> "Tensor":
        return x - y * self.options.lr
