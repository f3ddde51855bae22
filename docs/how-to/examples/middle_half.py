"""Mean of the middle half of every coordinate: Yin et al. 2018, https://arxiv.org/abs/1803.01498."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fl_server_ai.aggregation import STRATEGIES, Strategy

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class MiddleHalfOptions:
    """How much is cut off."""

    trim: float = field(
        default=0.25,
        metadata={"ge": 0.0, "lt": 0.5, "doc": "Share of the updates dropped at each end."},
    )


@STRATEGIES.register("MiddleHalf")
class MiddleHalf(Strategy[MiddleHalfOptions]):
    """Drop the extremes of every coordinate, then average the rest; sample sizes don't count."""

    Options = MiddleHalfOptions
    paper = "1803.01498"

    def reduce(self, rows: "Tensor") -> "Tensor":
        cut = int(self.options.trim * rows.shape[0])
        kept = rows.double().sort(dim=0).values[cut : rows.shape[0] - cut]
        return kept.mean(dim=0)
