"""Buffered asynchronous aggregation: Nguyen et al. 2022, https://arxiv.org/abs/2106.06639."""

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
from fl_server_ai.aggregation.geometry import stride

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class FedBuffOptions:
    """How far a step goes, and who counts how much in it."""

    server_lr: float = field(
        default=1.0, metadata={"gt": 0.0, "le": 1000.0, "doc": "Learning rate of the server."}
    )
    weighting: str = weighting_field("uniform")
    normalised: bool = field(
        default=False,
        metadata={
            "doc": "Divide by the staleness weights as well, so that stale updates count less among each other "
            "and the step is as long as with fresh ones."
        },
    )


@STRATEGIES.register("FedBuff")
class FedBuff(Strategy[FedBuffOptions]):
    """x' = x + server_lr / K sum S(s_k) D_k over K updates, D_k being the way from the version that k trained from.

    S is the training's `staleness_weight`; with the weighting "samples" 1 / K becomes n_k / sum n, and
    normalised, S / K or n_k S / sum n becomes n_k S / sum n S. A fresh buffer and server_lr 1 make it FedAvg. `buffer_size` is K.
    """

    Options = FedBuffOptions
    paper = "2106.06639"
    mode = "buffered"
    share = 1.0  # of a step that staleness leaves

    def weights(self, metas: Sequence[UpdateMeta], gram: "Tensor | None") -> Sequence[float]:
        plain = sample_weights(metas, self.options.weighting)
        counted = [n * meta.discount for n, meta in zip(plain, metas, strict=True)]
        self.share = 1.0 if self.options.normalised else math.fsum(counted) / math.fsum(plain)
        return plain

    def update(self, x: "Tensor", y: "Tensor", state: "dict[str, Tensor]") -> "Tensor":
        return stride(x, y, self.options.server_lr * self.share)

    def statistics(self, x: "Tensor", y: "Tensor") -> "Tensor":
        return stride(x, y, self.share)
