"""Weighted mean of the updates: McMahan et al. 2017, https://arxiv.org/abs/1602.05629."""

from collections.abc import Sequence
from dataclasses import dataclass
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


@STRATEGIES.register("FedAvg")
class FedAvg(Strategy[FedAvgOptions]):
    """x' = sum n_k y_k / sum n_k."""

    Options = FedAvgOptions
    paper = "1602.05629"

    def weights(self, metas: Sequence[UpdateMeta], gram: "Tensor | None") -> Sequence[float]:
        return sample_weights(metas, self.options.weighting)
