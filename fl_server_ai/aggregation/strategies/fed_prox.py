"""Clients stay near the global model: Li et al. 2020, https://arxiv.org/abs/1812.06127."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fl_server_ai.aggregation import (
    STRATEGIES,
    Extra,
    Strategy,
    UpdateMeta,
    sample_weights,
    weighting_field,
)

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class FedProxOptions:
    """How strongly clients are held, and who counts how much."""

    mu: float = field(
        default=0.01,
        metadata={"ge": 0.0, "doc": "Strength of the proximal term; the paper tries 0.001 to 1."},
    )
    weighting: str = weighting_field()
    adaptive: bool = field(
        default=False,
        metadata={
            "doc": "Change mu by the mean loss of the global model that clients report "
            "(`extra.prox.loss`): more when it rises, less when it has fallen for a while."
        },
    )
    delta: float = field(
        default=0.1, metadata={"gt": 0.0, "le": 100.0, "doc": "How much mu changes at a time."}
    )
    patience: int = field(
        default=5,
        metadata={"ge": 1, "le": 10_000, "doc": "Rounds without a rise before mu gets less."},
    )
    mu_max: float = field(
        default=10.0, metadata={"gt": 0.0, "le": 1e6, "doc": "Where an adaptive mu stops rising."}
    )


@STRATEGIES.register("FedProx")
class FedProx(Strategy[FedProxOptions]):
    """The server averages; a client minimises its loss + mu/2 ||w - x||^2, x being the global model.

    Clients may do fewer steps than asked: their partial work is averaged all the same. The adaptive mu is the
    heuristic of the paper's experiments: with the mean loss L_t over the round's updates, L_t <= L_(t-1) adds
    one to a counter, which at `patience` lowers mu by `delta` and starts again; a rise raises mu by `delta`.
    """

    Options = FedProxOptions
    paper = "1812.06127"
    by_number = True
    mu: float | None = None
    loss: float | None = None
    falls = 0

    def extras(self) -> tuple[Extra, ...]:
        said = "the loss of the global model on the client's data, before training, without the proximal term"
        return (Extra("prox.loss", said),) if self.options.adaptive else ()

    def weights(self, metas: Sequence[UpdateMeta], gram: "Tensor | None") -> Sequence[float]:
        if self.options.adaptive:
            self._adapt(math.fsum(meta.extras["prox.loss"] for meta in metas) / len(metas))
        return sample_weights(metas, self.options.weighting)

    def _adapt(self, loss: float) -> None:
        mu = self.options.mu if self.mu is None else self.mu
        if self.loss is None or loss <= self.loss:
            self.falls += 1
            if self.falls == self.options.patience:
                mu, self.falls = max(0.0, mu - self.options.delta), 0
        else:
            mu, self.falls = min(self.options.mu_max, mu + self.options.delta), 0
        self.mu, self.loss = mu, loss

    def state_dict(self) -> dict[str, Any]:
        if not self.options.adaptive:
            return {}
        return {"mu": self.mu, "loss": self.loss, "falls": self.falls}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.mu, self.loss, self.falls = state["mu"], state["loss"], state["falls"]

    def client_config(self) -> dict[str, Any]:
        return {"mu": self.options.mu if self.mu is None else self.mu}
