"""Dynamic regularisation: Acar et al. 2021, https://arxiv.org/abs/2111.04263."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fl_server_ai.aggregation import STRATEGIES, Strategy, UpdateMeta

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class FedDynOptions:
    """How strongly clients are held."""

    alpha: float = field(
        default=0.01,
        metadata={"gt": 0.0, "le": 1000.0, "doc": "Strength; the paper tries 0.001 to 0.1."},
    )


@STRATEGIES.register("FedDyn")
class FedDyn(Strategy[FedDynOptions]):
    """h' = h - alpha / N sum(y_k - x); x' = mean(y_k) - h' / alpha, over the round's updates.

    N are all participants of the training when the round asked: as they change, N h stays the sum of all g_k, 0 of
    those who join, with that of those who left: it stays part of what is minimised. A client minimises
    F(w) - <g_k, w> + alpha/2 |w - x|^2 and sets g_k' = g_k - alpha (y_k - x), which it keeps. The mean is
    unweighted, so that h is the mean of all g_k: in the mode sync, without late updates. Integer buffers are averaged.
    """

    Options = FedDynOptions
    paper = "2111.04263"
    state_blocks = ("h",)
    population_means = ("h",)
    clients_keep = "their own gradients g_k, whose mean h is"
    only_fresh = "h is the whole sum of what its sites have learned, and late ones count less"
    share = 1.0

    def weights(self, metas: Sequence[UpdateMeta], gram: "Tensor | None") -> Sequence[float]:
        self.share = len(metas) / self.population(len(metas))
        return [1] * len(metas)

    def update(self, x: "Tensor", y: "Tensor", state: "dict[str, Tensor]") -> "Tensor":
        state["h"] = state["h"] - (y - x) * (self.options.alpha * self.share)
        return y - state["h"] / self.options.alpha

    def client_config(self) -> dict[str, Any]:
        return {"alpha": self.options.alpha}
