"""Weighted mean of the updates: McMahan et al. 2017, https://arxiv.org/abs/1602.05629."""

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
class FedAvgOptions:
    """Who counts how much."""

    weighting: str = weighting_field()
    cap: int | None = field(
        default=None,
        metadata={
            "ge": 1,
            "le": 2**31,
            "doc": "An update counts for at most so many examples; null: for all it was trained on.",
        },
    )


@STRATEGIES.register("FedAvg")
class FedAvg(Strategy[FedAvgOptions]):
    """x' = sum n_k y_k / sum n_k, with n_k = min(n_k, cap) if there is a cap."""

    Options = FedAvgOptions
    paper = "1602.05629"
    by_number = True

    def weights(self, metas: Sequence[UpdateMeta], gram: "Tensor | None") -> Sequence[float]:
        weights = sample_weights(metas, self.options.weighting)
        cap = self.options.cap
        return weights if cap is None else [min(weight, cap) for weight in weights]
