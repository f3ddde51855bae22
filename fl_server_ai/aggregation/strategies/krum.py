"""The update with the closest neighbours: Blanchard et al. 2017, https://arxiv.org/abs/1703.02757."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fl_server_ai.aggregation import STRATEGIES, Strategy, UpdateMeta
from fl_server_ai.aggregation.geometry import compared, squared_distances
from fl_server_core.exceptions import AggregationException

if TYPE_CHECKING:
    from torch import Tensor


def f_field(most: str) -> Any:
    """The option of how many updates may be arbitrary."""
    return field(
        default=None,
        metadata={
            "ge": 0,
            "le": 100_000,
            "asked": True,
            "doc": f"How many updates may be arbitrary: say it, no default is safe. null: as many as "
            f"the rule stands, {most}.",
        },
    )


@dataclass(frozen=True)
class KrumOptions:
    """How many bad updates to expect."""

    f: int | None = f_field("(n - 3) / 2 rounded down")


@STRATEGIES.register("Krum")
class Krum(Strategy[KrumOptions]):
    """Takes over the one update whose squared distances to its n - f - 2 nearest others sum to the least.

    Needs n >= 2 f + 3 updates. Distances are over all float tensors; of equal ones the first participant wins.
    Integer buffers are the winner's.
    """

    Options = KrumOptions
    paper = "1703.02757"
    needs_gram = needs_distances = True
    assumes = "n >= 2 f + 3"

    def fewest(self) -> int:
        return 2 * (self.options.f or 0) + 3

    def weights(self, metas: Sequence[UpdateMeta], gram: "Tensor | None") -> Sequence[float]:
        best = lowest(scores(gram, standable(self.options.f, len(metas))), 1)
        return [float(index in best) for index in range(len(metas))]


def standable(f: int | None, n: int) -> int:
    """What is asked for, or the largest f that n updates allow."""
    return (n - 3) // 2 if f is None else f


def scores(gram: "Tensor | None", f: int) -> list[float]:
    """Of each update the sum of its squared distances to its n - f - 2 nearest others, at least one."""
    return scores_of(squared_distances(compared(gram)), f)


def scores_of(squares: "Tensor", f: int) -> list[float]:
    """The same of squared distances, (n, n) with infinity on the diagonal."""
    nearest = max(1, len(squares) - f - 2)
    values: list[float] = squares.sort(dim=1).values[:, :nearest].sum(dim=1).tolist()
    return values


def lowest(scores: Sequence[float], count: int) -> list[int]:
    """The best updates, in their order; equal scores go to the lower index."""
    best = sorted(range(len(scores)), key=scores.__getitem__)[:count]
    if not all(math.isfinite(scores[index]) for index in best):
        raise AggregationException(f"fewer than {count} updates are small enough to be compared")
    return sorted(best)
