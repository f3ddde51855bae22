"""Clients stay near the global model: Li et al. 2020, https://arxiv.org/abs/1812.06127."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

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
class FedProxOptions:
    """How strongly clients are held, and who counts how much."""

    mu: float = field(
        default=0.01,
        metadata={"ge": 0.0, "doc": "Strength of the proximal term; the paper tries 0.001 to 1."},
    )
    weighting: str = weighting_field()


@STRATEGIES.register("FedProx")
class FedProx(Strategy[FedProxOptions]):
    """The server averages; a client minimises its loss + mu/2 ||w - x||^2, x being the global model.

    Clients may do fewer steps than asked: their partial work is averaged all the same.
    """

    Options = FedProxOptions
    paper = "1812.06127"

    def weights(self, metas: Sequence[UpdateMeta], gram: "Tensor | None") -> Sequence[float]:
        return sample_weights(metas, self.options.weighting)

    def client_config(self) -> dict[str, Any]:
        return {"mu": self.options.mu}
