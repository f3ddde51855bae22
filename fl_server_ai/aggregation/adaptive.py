"""What FedAdagrad, FedAdam and FedYogi share: Reddi et al. 2021, https://arxiv.org/abs/2003.00295."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from fl_server_ai.aggregation.strategy import Strategy, UpdateMeta, sample_weights

if TYPE_CHECKING:
    from torch import Tensor


class AdaptiveOptions(Protocol):
    """The options that all of them have."""

    @property
    def eta(self) -> float: ...
    @property
    def beta_1(self) -> float: ...
    @property
    def tau(self) -> float: ...
    @property
    def variant(self) -> str: ...
    @property
    def weighting(self) -> str: ...


AdaptiveT = TypeVar("AdaptiveT", bound=AdaptiveOptions)


def eta_field(default: float) -> Any:
    return field(
        default=default, metadata={"gt": 0.0, "le": 1000.0, "doc": "Learning rate of the server."}
    )


def beta_field(default: float, of: str) -> Any:
    return field(
        default=default,
        metadata={"ge": 0.0, "lt": 1.0, "doc": f"What is kept of the {of} moment each round."},
    )


def tau_field() -> Any:
    return field(
        default=1e-3,
        metadata={"gt": 0.0, "le": 1.0, "doc": "Adaptivity: added to the root; larger is less."},
    )


def variant_field(flwr: str) -> Any:
    return field(
        default="paper",
        metadata={
            "choices": ("paper", "zero", "flwr"),
            "doc": f"The second moment starts at tau^2, as in the paper, at zero, or as in flwr: {flwr}.",
        },
    )


class Adaptive(Strategy[AdaptiveT]):
    """m = beta_1 m + (1 - beta_1) D and x' = x + eta m / (sqrt(v) + tau), D being the mean of (update - x).

    Subclasses say how v grows. It starts at tau^2, or at 0 by option: the paper asks for no more than v >= tau^2
    before the first round, FEDn has 0. Inside, D and m have the other sign: x - 0 keeps a minus zero, x + 0 does not.
    """

    paper = "2003.00295"
    by_number = True
    state_blocks = ("m", "v")
    rounds = 0

    def weights(self, metas: Sequence[UpdateMeta], gram: "Tensor | None") -> Sequence[float]:
        self.rounds += 1
        return sample_weights(metas, self.options.weighting)

    def second_moment(self, v: "Tensor", square: "Tensor") -> "Tensor":
        """The new v, of the old one and D^2."""
        raise NotImplementedError

    def rate(self) -> float:
        """The server's learning rate in this round."""
        return self.options.eta

    def update(self, x: "Tensor", y: "Tensor", state: "dict[str, Tensor]") -> "Tensor":
        back = x - y
        kept = self.options.beta_1
        state["m"] = state["m"] * kept + back * (1 - kept)
        state["v"] = self.second_moment(state["v"], back * back)
        return x - state["m"] * self.rate() / (state["v"].sqrt() + self.options.tau)

    def initial_state(self) -> Mapping[str, float]:
        return {"v": self.options.tau**2 if self.options.variant == "paper" else 0.0}

    def state_dict(self) -> dict[str, Any]:
        return {"rounds": self.rounds}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rounds = state["rounds"]


def corrected(eta: float, beta_1: float, beta_2: float, rounds: int) -> float:
    """flwr's bias correction; the exponent is one more than the number of the round, from 1."""
    return eta * math.sqrt(1 - beta_2 ** (rounds + 1)) / (1 - beta_1 ** (rounds + 1))
