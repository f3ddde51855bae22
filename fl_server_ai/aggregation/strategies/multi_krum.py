"""The mean of the updates with the closest neighbours: Blanchard et al. 2017, https://arxiv.org/abs/1703.02757."""

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
from fl_server_ai.aggregation.strategies.krum import f_field, lowest, scores, standable

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class MultiKrumOptions:
    """How many bad updates to expect, and how many good ones to average."""

    f: int | None = f_field("(n - 3) / 2 rounded down")
    m: int | None = field(
        default=None,
        metadata={"ge": 1, "le": 100_000, "doc": "How many updates are averaged; null: n - f."},
    )
    weighting: str = weighting_field("uniform")


@STRATEGIES.register("MultiKrum")
class MultiKrum(Strategy[MultiKrumOptions]):
    """The mean of the m updates with the lowest scores of Krum; unweighted, as in the paper.

    Needs n >= 2 f + 3 updates, and m of them. Integer buffers are averaged over the same m.
    """

    Options = MultiKrumOptions
    paper = "1703.02757"
    needs_gram = needs_distances = True
    assumes = "n >= 2 f + 3 and n >= m"

    def fewest(self) -> int:
        return max(2 * (self.options.f or 0) + 3, self.options.m or 0)

    def weights(self, metas: Sequence[UpdateMeta], gram: "Tensor | None") -> Sequence[float]:
        f = standable(self.options.f, len(metas))
        best = lowest(scores(gram, f), self.options.m or len(metas) - f)
        sizes = sample_weights(metas, self.options.weighting)
        return [size if index in best else 0 for index, size in enumerate(sizes)]
