"""Inexact ADMM whose duals need not travel: Ryu, Kim 2022, https://arxiv.org/abs/2202.03672."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fl_server_ai.aggregation import STRATEGIES, Strategy, UpdateMeta

if TYPE_CHECKING:
    from torch import Tensor


def rho_field() -> Any:
    """The option of the penalty."""
    return field(
        default=500.0,
        metadata={"gt": 0.0, "le": 1e9, "doc": "Penalty for being away from the global model."},
    )


@dataclass(frozen=True)
class IIADMMOptions:
    """The penalty that clients use."""

    rho: float = rho_field()


@STRATEGIES.register("IIADMM")
class IIADMM(Strategy[IIADMMOptions]):
    """l_k' = l_k + rho (x - z_k), x' = mean(z_k) - mean(l_k') / rho.

    A client makes z = x + (l_k - g) / rho for each batch, sends z, and at the end updates its own l_k in
    the same way, with the x that it was sent. The server needs only the sum of all l_k / rho. With everybody in
    each round this is APPFL's rule; otherwise the first mean is over the round's updates, the second over
    all participants, whose duals wait, and those of who has left stay in the sum. Sample sizes do not count. In the mode sync, without late updates.
    """

    Options = IIADMMOptions
    paper = "2202.03672"
    state_blocks = ("duals",)
    clients_keep = "their own duals, whose sum the server has"
    only_fresh = "it keeps the sum of its sites' duals, and late ones count less"
    updates = 0
    everybody = 0

    def weights(self, metas: Sequence[UpdateMeta], gram: "Tensor | None") -> Sequence[float]:
        self.updates = len(metas)
        self.everybody = self.population(len(metas))
        return [1] * len(metas)

    def update(self, x: "Tensor", y: "Tensor", state: "dict[str, Tensor]") -> "Tensor":
        state["duals"] = state["duals"] + (x - y) * self.updates
        return y - state["duals"] / self.everybody

    def client_config(self) -> dict[str, Any]:
        return {"rho": self.options.rho}
