"""Smoothed geometric median (RFA): Pillutla, Kakade, Harchaoui 2022, https://arxiv.org/abs/1912.13445."""

import math
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
from fl_server_ai.aggregation.geometry import (
    compared,
    distances_from,
    median,
    squared_distances,
    within_reach,
)
from fl_server_core.exceptions import AggregationException

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class GeometricMedianOptions:
    """How exactly it is worked out."""

    nu: float = field(
        default=1e-6,
        metadata={"gt": 0.0, "le": 1e6, "doc": "Smoothing: shorter distances count as this one."},
    )
    iters: int = field(
        default=10, metadata={"ge": 1, "le": 10_000, "doc": "At most so many steps; each is cheap."}
    )
    tolerance: float = field(
        default=1e-6,
        metadata={"ge": 0.0, "lt": 1.0, "doc": "Stop when the objective changes less, relatively."},
    )
    start: str = field(
        default="mean",
        metadata={
            "choices": ("mean", "medoid"),
            "doc": "Step from the weighted mean, as in the paper, or from the update that is the best "
            "centre: each step from the mean takes an outlier back by a factor only.",
        },
    )
    weighting: str = weighting_field()


@STRATEGIES.register("GeometricMedian")
class GeometricMedian(Strategy[GeometricMedianOptions]):
    """The point with the least weighted sum of distances to the updates, by Weiszfeld's steps from their mean.

    v = sum b_k y_k / sum b_k, where b_k = p_k / max(nu, |v - y_k|). Stands less than half of the *weight* being
    arbitrary; a participant may claim any sample size, so take "uniform" where they are not trusted.
    Integer buffers are averaged with the same b_k.
    """

    Options = GeometricMedianOptions
    paper = "1912.13445"
    needs_gram = True

    def weights(self, metas: Sequence[UpdateMeta], gram: "Tensor | None") -> Sequence[float]:
        given, gram = self.options, compared(gram)
        reached = zip(sample_weights(metas, given.weighting), within_reach(gram), strict=True)
        sizes = [size if usable else 0 for size, usable in reached]
        if not any(sizes):
            raise AggregationException("no update is small enough to be compared")
        p = [size / sum(sizes) for size in sizes]
        shares = p if given.start == "mean" else around_medoid(gram, p)
        before = math.inf
        for _ in range(given.iters):
            away = distances_from(gram, shares)
            value = sum(share * far for share, far in zip(p, away, strict=True) if share)
            if before - value <= given.tolerance * before < math.inf:
                break
            before = value
            b = [share / max(given.nu, far) for share, far in zip(p, away, strict=True)]
            shares = [one / sum(b) for one in b]
        return shares


def around_medoid(gram: "Tensor", p: Sequence[float]) -> list[float]:
    """One step from the update with the least weighted sum of distances; its own counts as the median one."""
    squares = squared_distances(gram).fill_diagonal_(0)
    away = [[math.sqrt(square) for square in line] for line in squares.tolist()]
    usable = [k for k, part in enumerate(p) if part]
    medoid = min(usable, key=lambda j: sum(p[k] * away[j][k] for k in usable))
    typical = median([far for k, far in enumerate(away[medoid]) if p[k] and k != medoid] or [1.0])
    typical = typical or 1.0
    b = [part / max(typical, far) for part, far in zip(p, away[medoid], strict=True)]
    return [one / sum(b) for one in b]
