"""Trimmed mean of every coordinate: Yin et al. 2018, https://arxiv.org/abs/1803.01498."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fl_server_ai.aggregation import STRATEGIES, Strategy, UpdateMeta, sample_weights
from fl_server_ai.aggregation.order import mean_of, ranked

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TrimmedMeanOptions:
    """How much is left out."""

    beta: float = field(
        default=0.2,
        metadata={
            "ge": 0.0,
            "lt": 0.5,
            "doc": "Share of the updates dropped at each end, rounded down: of fewer than 1/beta "
            "updates none is dropped. The share of bad updates must not be larger.",
        },
    )


@STRATEGIES.register("TrimmedMean")
class TrimmedMean(Strategy[TrimmedMeanOptions]):
    """Of each coordinate, the mean without the floor(beta n) smallest and largest; sample sizes do not count.

    Integer buffers get the unweighted mean of all updates.
    """

    Options = TrimmedMeanOptions
    paper = "1803.01498"
    by_number = True

    def weights(self, metas: Sequence[UpdateMeta], gram: "Tensor | None") -> Sequence[float]:
        return sample_weights(metas, "uniform")

    def reduce(self, rows: "Tensor") -> "Tensor":
        cut = cut_of(self.options.beta, len(rows))
        return mean_of(ranked(rows, cut, len(rows) - cut))


def cut_of(beta: float, n: int) -> int:
    """floor(beta n), where 0.29 of 100 are 29 although the product is a little less; some always stay."""
    return min(int(beta * n + 1e-9), (n - 1) // 2)
