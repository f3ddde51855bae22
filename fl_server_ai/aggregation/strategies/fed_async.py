"""Fully asynchronous aggregation: Xie, Koyejo, Gupta 2019, https://arxiv.org/abs/1903.03934."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fl_server_ai.aggregation import STRATEGIES, Strategy, UpdateMeta
from fl_server_ai.aggregation.geometry import stride

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class FedAsyncOptions:
    """How far the model goes towards each update."""

    alpha: float = field(
        default=0.6,
        metadata={"gt": 0.0, "le": 1.0, "doc": "Share of a fresh update in the new model."},
    )


@STRATEGIES.register("FedAsync")
class FedAsync(Strategy[FedAsyncOptions]):
    """x' = (1 - a) x + a y for each update y as it comes, a = alpha S(s); S is the training's `staleness_weight`."""

    Options = FedAsyncOptions
    paper = "1903.03934"
    mode = "async"
    rebases = False
    share = 1.0

    def weights(self, metas: Sequence[UpdateMeta], gram: "Tensor | None") -> Sequence[float]:
        self.share = self.options.alpha * sum(meta.discount for meta in metas) / len(metas)
        return [1.0] * len(metas)

    def update(self, x: "Tensor", y: "Tensor", state: "dict[str, Tensor]") -> "Tensor":
        return stride(x, y, self.share)

    def statistics(self, x: "Tensor", y: "Tensor") -> "Tensor":
        return stride(x, y, self.share)
