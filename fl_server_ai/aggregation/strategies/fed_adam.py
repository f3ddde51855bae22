"""Adam at the server: Reddi et al. 2021, algorithm 2, https://arxiv.org/abs/2003.00295."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fl_server_ai.aggregation import STRATEGIES, weighting_field
from fl_server_ai.aggregation.adaptive import (
    Adaptive,
    beta_field,
    corrected,
    eta_field,
    tau_field,
    variant_field,
)

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class FedAdamOptions:
    """The server's step."""

    eta: float = eta_field(0.1)
    beta_1: float = beta_field(0.9, "first")
    beta_2: float = beta_field(0.99, "second")
    tau: float = tau_field()
    variant: str = variant_field("at 0, with a bias correction whose exponent is the round plus 1")
    weighting: str = weighting_field()


@STRATEGIES.register("FedAdam")
class FedAdam(Adaptive[FedAdamOptions]):
    """v = beta_2 v + (1 - beta_2) D^2; m = beta_1 m + (1 - beta_1) D; x' = x + eta m / (sqrt(v) + tau).

    D = mean - x; v starts at tau^2, m at zero; no bias correction, as in the paper. Integer buffers and running statistics are averaged.
    """

    Options = FedAdamOptions

    def second_moment(self, v: "Tensor", square: "Tensor") -> "Tensor":
        return v * self.options.beta_2 + square * (1 - self.options.beta_2)

    def rate(self) -> float:
        given = self.options
        if given.variant != "flwr":
            return given.eta
        return corrected(given.eta, given.beta_1, given.beta_2, self.rounds)
