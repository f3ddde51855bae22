"""Averaging with server momentum: Hsu, Qi, Brown 2019, https://arxiv.org/abs/1909.06335."""

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
class FedAvgMOptions:
    """How far the server goes, and how long it keeps its direction."""

    server_lr: float = field(
        default=1.0, metadata={"gt": 0.0, "le": 1000.0, "doc": "Learning rate of the server."}
    )
    momentum: float = field(
        default=0.9,
        metadata={"ge": 0.0, "lt": 1.0, "doc": "What is kept of the last direction; 0: FedAvg."},
    )
    weighting: str = weighting_field()


@STRATEGIES.register("FedAvgM")
class FedAvgM(Strategy[FedAvgMOptions]):
    """g = x - mean; m = momentum m + g, from zero; x' = x - server_lr m."""

    Options = FedAvgMOptions
    paper = "1909.06335"
    by_number = True
    state_blocks = ("m",)

    def weights(self, metas: Sequence[UpdateMeta], gram: "Tensor | None") -> Sequence[float]:
        return sample_weights(metas, self.options.weighting)

    def update(self, x: "Tensor", y: "Tensor", state: "dict[str, Tensor]") -> "Tensor":
        state["m"] = state["m"] * self.options.momentum + (x - y)
        return x - state["m"] * self.options.server_lr
