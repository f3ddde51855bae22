"""Adagrad at the server: Reddi et al. 2021, algorithm 2, https://arxiv.org/abs/2003.00295."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fl_server_ai.aggregation import STRATEGIES, weighting_field
from fl_server_ai.aggregation.adaptive import (
    Adaptive,
    beta_field,
    eta_field,
    tau_field,
    variant_field,
)

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class FedAdagradOptions:
    """The server's step."""

    eta: float = eta_field(0.1)
    beta_1: float = beta_field(0.0, "first")
    tau: float = tau_field()
    variant: str = variant_field("at zero too, with the same result")
    weighting: str = weighting_field()


@STRATEGIES.register("FedAdagrad")
class FedAdagrad(Adaptive[FedAdagradOptions]):
    """v = v + D^2; m = beta_1 m + (1 - beta_1) D; x' = x + eta m / (sqrt(v) + tau), D = mean - x.

    v starts at tau^2, m at zero. Integer buffers and running statistics are averaged.
    """

    Options = FedAdagradOptions

    def second_moment(self, v: "Tensor", square: "Tensor") -> "Tensor":
        return v + square
