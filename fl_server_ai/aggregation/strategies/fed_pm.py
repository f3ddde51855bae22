"""Probabilistic masks over frozen random weights: Isik et al. 2023, https://arxiv.org/abs/2209.15328."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fl_server_ai.aggregation import STRATEGIES, Strategy, UpdateMeta

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class FedPMOptions:
    """How long masks are remembered."""

    reset_every: int = field(
        default=1,
        metadata={
            "ge": 0,
            "le": 1_000_000,
            "doc": "Forget what earlier rounds said after so many rounds; 0: never.",
        },
    )
    prior: float = field(
        default=1.0,
        metadata={
            "ge": 1.0,
            "le": 1e6,
            "doc": "Both parameters of the Beta distribution at first.",
        },
    )


@STRATEGIES.register("FedPM")
class FedPM(Strategy[FedPMOptions]):
    """a = a + sum m_k, b = b + K - sum m_k; x' = (a - 1) / (a + b - 2), the mode of Beta(a, b).

    The model's float tensors are the probabilities of a mask over random weights that all sites make from the
    same seed. Clients send masks: zeros and ones in the place of weights, each drawn with its probability; others
    are refused when they arrive. Sample sizes do not count. In the mode sync, without late updates.
    """

    Options = FedPMOptions
    paper = "2209.15328"
    state_blocks = ("a", "b")
    takes = "mask"
    only_fresh = "it counts ones, and a mask was drawn from the version that it was asked for"
    updates = 0
    rounds = 0

    def initial_state(self) -> Mapping[str, float]:
        return {"a": self.options.prior, "b": self.options.prior}

    def weights(self, metas: Sequence[UpdateMeta], gram: "Tensor | None") -> Sequence[float]:
        self.updates = len(metas)
        self.rounds += 1
        return [1] * len(metas)

    def update(self, x: "Tensor", y: "Tensor", state: "dict[str, Tensor]") -> "Tensor":
        every = self.options.reset_every
        if every and (self.rounds - 1) % every == 0:
            state["a"] = y * 0 + self.options.prior
            state["b"] = y * 0 + self.options.prior
        ones = (y * self.updates).round()
        state["a"] = state["a"] + ones
        state["b"] = state["b"] + (self.updates - ones)
        return (state["a"] - 1) / (state["a"] + state["b"] - 2)

    def state_dict(self) -> dict[str, Any]:
        return {"rounds": self.rounds}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rounds = state["rounds"]
