"""Krum's choice, then a trimmed mean of it: El Mhamdi et al. 2018, https://arxiv.org/abs/1802.07927."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fl_server_ai.aggregation import STRATEGIES, Strategy, UpdateMeta
from fl_server_ai.aggregation.geometry import compared, squared_distances
from fl_server_ai.aggregation.order import mean_of, ranked
from fl_server_ai.aggregation.strategies.krum import f_field, lowest, scores, scores_of

if TYPE_CHECKING:
    from torch import Tensor

# Of a block, that are worked on at a time: all ranks of a whole one, and a dozen rows of float64 beside them, were
# four times its own memory in each thread.
COLUMNS = 32_768


@dataclass(frozen=True)
class BulyanOptions:
    """How many bad updates to expect, and how the good ones are chosen."""

    f: int | None = f_field("(n - 3) / 4 rounded down")
    selection: str = field(
        default="iterative",
        metadata={
            "choices": ("iterative", "oneshot"),
            "doc": "Krum again and again without the winners, as in the paper, or the best n - 2 f "
            "of one scoring, as in flwr.",
        },
    )


@STRATEGIES.register("Bulyan")
class Bulyan(Strategy[BulyanOptions]):
    """theta = n - 2 f updates chosen by Krum; of each coordinate the mean of the theta - 2 f nearest the median.

    Needs n >= 4 f + 3 updates. Of two values equally near the median the smaller is taken.
    Integer buffers are averaged over the chosen.
    """

    Options = BulyanOptions
    paper = "1802.07927"
    needs_gram = needs_distances = True
    assumes = "n >= 4 f + 3"

    def fewest(self) -> int:
        return 4 * (self.options.f or 0) + 3

    def weights(self, metas: Sequence[UpdateMeta], gram: "Tensor | None") -> Sequence[float]:
        n = len(metas)
        self.f = (n - 3) // 4 if self.options.f is None else self.options.f
        if self.options.selection == "oneshot":
            chosen = lowest(scores(gram, self.f), n - 2 * self.f)
        else:
            chosen = by_turns(squared_distances(compared(gram)), self.f)
        return [float(index in chosen) for index in range(n)]

    def reduce(self, rows: "Tensor") -> "Tensor":
        n, width = rows.shape
        mean = rows.new_empty(width, dtype=rows[:0, :0].double().dtype)
        # A GPU makes up for its memory with speed.
        columns = width if rows.is_cuda else COLUMNS
        for start in range(0, width, columns):
            part = slice(start, start + columns)
            mean[part] = mean_of(near_median(ranked(rows[:, part], 0, n), n - 2 * self.f))
        return mean


def by_turns(squares: "Tensor", f: int) -> list[int]:
    """n - 2 f updates, each the Krum winner among those that are left."""
    left = list(range(len(squares)))
    chosen = []
    for _ in range(len(squares) - 2 * f):
        rest = squares[left][:, left]
        winner = lowest(scores_of(rest, f), 1)[0] if len(left) > 1 else 0
        chosen.append(left.pop(winner))
    return chosen


def near_median(ordered: "Tensor", count: int) -> "Tensor":
    """(n, block) sorted in each column to the `count` values nearest its median, (count, block), sorted."""
    n = len(ordered)
    middle = mean_of(ordered[(n - 1) // 2 : n // 2 + 1])
    first = ordered[0].long() * 0
    nearest = (ordered[count - 1].double() - middle).maximum(middle - ordered[0].double())
    for start in range(1, n - count + 1):
        # Neighbours in order are one window; the best is the one that reaches out least.
        reach = (ordered[start + count - 1].double() - middle).maximum(
            middle - ordered[start].double()
        )
        better = reach < nearest
        nearest = reach.where(better, nearest)
        first = first.masked_fill(better, start)
    if ordered.element_size() == 1:
        ordered = ordered.float()  # torch gathers no float8
    chosen = ordered[:count].clone()
    for step, row in enumerate(
        chosen
    ):  # places are int64: all at once they were more than the rows
        row.copy_(ordered.gather(0, (first + step)[None])[0])
    return chosen
