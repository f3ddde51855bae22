"""Median of every coordinate: Yin et al. 2018, https://arxiv.org/abs/1803.01498."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fl_server_ai.aggregation import STRATEGIES, Strategy, UpdateMeta, sample_weights
from fl_server_ai.aggregation.order import mean_of, ranked
from fl_server_ai.aggregation.strategy import NoOptions

if TYPE_CHECKING:
    from torch import Tensor


@STRATEGIES.register("FedMedian")
class FedMedian(Strategy[NoOptions]):
    """The middle value of each coordinate, or the mean of the two middle ones; sample sizes do not count.

    Stands fewer than half of the updates being arbitrary. Integer buffers get the unweighted mean, which
    does not.
    """

    paper = "1803.01498"
    by_number = True

    def weights(self, metas: Sequence[UpdateMeta], gram: "Tensor | None") -> Sequence[float]:
        return sample_weights(metas, "uniform")

    def reduce(self, rows: "Tensor") -> "Tensor":
        n = len(rows)
        return mean_of(ranked(rows, (n - 1) // 2, n // 2 + 1))
