"""Trust from a root update: Cao et al. 2021, https://arxiv.org/abs/2012.13995."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fl_server_ai.aggregation import STRATEGIES, Strategy, UpdateMeta
from fl_server_ai.aggregation.geometry import compared, stride
from fl_server_core.exceptions import AggregationException

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class FLTrustOptions:
    """Whom to trust."""

    root: str | None = field(
        default=None,
        metadata={
            "pattern": "[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}",
            "doc": "Id of the participant whose updates are trusted: it trains on the small clean data "
            "set of the paper. null: the training's actor, who then takes part himself.",
        },
    )


@STRATEGIES.register("FLTrust")
class FLTrust(Strategy[FLTrustOptions]):
    """T_k = max(0, cos(D_k, D_0)); x' = x + sum T_k (|D_0| / |D_k|) D_k / sum T_k, D_k = y_k - x.

    D_0 is the update of the root, a participant like the others: the server itself holds no data. Its update
    measures the others and is no part of the mean. Where nobody is trusted, the model stays as it is. A
    round without the root's update ends the training with this reason. Integer buffers get the same weights.
    """

    Options = FLTrustOptions
    paper = "2012.13995"
    needs_gram = True
    knows_participants = True
    may_keep = True
    assumes = "the root's and another"
    share = 1.0

    def fewest(self) -> int:
        return 2

    def weights(self, metas: Sequence[UpdateMeta], gram: "Tensor | None") -> Sequence[float]:
        root = self.options.root or self.facts.actor
        places = [k for k, meta in enumerate(metas) if meta.participant == root]
        if not places:
            raise AggregationException(f"FLTrust needs the update of its root, participant {root}")
        products = compared(gram)[places[0]].tolist()
        lengths = compared(gram).diagonal().sqrt().tolist()
        length = lengths[places[0]]
        trust = [
            0.0
            if k == places[0] or not 0 < own < float("inf") or not 0 < length < float("inf")
            else max(0.0, product / (own * length))
            for k, (product, own) in enumerate(zip(products, lengths, strict=True))
        ]
        weights = [t * length / own if t else 0.0 for t, own in zip(trust, lengths, strict=True)]
        self.share = sum(weights) / sum(trust) if any(trust) else 0.0
        return weights

    def update(self, x: "Tensor", y: "Tensor", state: "dict[str, Tensor]") -> "Tensor":
        return stride(x, y, self.share)

    def statistics(self, x: "Tensor", y: "Tensor") -> "Tensor":
        return stride(x, y, min(1.0, self.share))
