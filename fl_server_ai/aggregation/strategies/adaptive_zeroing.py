"""Updates that are far too large count as zero: as in TensorFlow Federated; estimate: https://arxiv.org/abs/1905.03871."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fl_server_ai.aggregation import (
    STRATEGIES,
    Strategy,
    UpdateMeta,
    sample_weights,
    weighting_field,
)
from fl_server_ai.aggregation.geometry import stride

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST, LARGEST = 1e-30, 1e30  # where the estimate stops, so that it stays a number


@dataclass(frozen=True)
class AdaptiveZeroingOptions:
    """What is far too large, and how fast that is learnt."""

    multiplier: float = field(
        default=2.0,
        metadata={"gt": 0.0, "le": 1e6, "doc": "Times the estimate: an update may go so far."},
    )
    increment: float = field(
        default=1.0, metadata={"ge": 0.0, "le": 1e6, "doc": "And so much further."}
    )
    estimate: float = field(
        default=10.0,
        metadata={"gt": 0.0, "le": 1e6, "doc": "The first estimate of how far updates go."},
    )
    quantile: float = field(
        default=0.98,
        metadata={"ge": 0.0, "le": 1.0, "doc": "The share of updates that go less far than it."},
    )
    rate: float = field(
        default=math.log(10),
        metadata={"gt": 0.0, "le": 10.0, "doc": "How fast the estimate follows, geometrically."},
    )
    weighting: str = weighting_field()


@STRATEGIES.register("AdaptiveZeroing")
class AdaptiveZeroing(Strategy[AdaptiveZeroingOptions]):
    """x' = x + sum p_k D_k over the updates with max|D_k| <= multiplier e + increment; p_k counts all of them.

    D_k = y_k - x. Then e' = e exp(-rate (b - quantile)), b being the share of updates with max|D_k| <= e.
    Against broken sites, not clever ones. If all are zeroed, the model stays as it is. Integer buffers are
    averaged over the updates that are left.
    """

    Options = AdaptiveZeroingOptions
    paper = "1905.03871"
    needs_largest = True
    may_keep = True
    share = 1.0
    estimate: float | None = None

    def weights(self, metas: Sequence[UpdateMeta], gram: "Tensor | None") -> Sequence[float]:
        given = self.options
        estimate = given.estimate if self.estimate is None else self.estimate
        far = [math.inf if meta.largest is None else meta.largest for meta in metas]
        limit = given.multiplier * estimate + given.increment
        sizes = sample_weights(metas, given.weighting)
        kept = [size if way <= limit else 0 for size, way in zip(sizes, far, strict=True)]
        self.share = sum(kept) / sum(sizes)
        below = sum(way <= estimate for way in far) / len(far)
        moved = estimate * math.exp(-given.rate * (below - given.quantile))
        self.estimate = min(LARGEST, max(SMALLEST, moved))
        return kept

    def update(self, x: "Tensor", y: "Tensor", state: "dict[str, Tensor]") -> "Tensor":
        return stride(x, y, self.share)

    def statistics(self, x: "Tensor", y: "Tensor") -> "Tensor":
        return stride(x, y, self.share)

    def state_dict(self) -> dict[str, Any]:
        return {"estimate": self.options.estimate if self.estimate is None else self.estimate}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.estimate = state["estimate"]
