"""Updates normalised by how many steps they made: Wang et al. 2020, https://arxiv.org/abs/2007.07481."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fl_server_ai.aggregation import (
    STRATEGIES,
    Extra,
    Refused,
    Strategy,
    UpdateMeta,
    sample_weights,
    weighting_field,
)
from fl_server_ai.aggregation.geometry import stride

if TYPE_CHECKING:
    from torch import Tensor


ROUNDED = 0.01  # norms may come in half floats
HEAVY = 0.99  # a momentum above those in use


@dataclass(frozen=True)
class FedNovaOptions:
    """The server's step, and the optimiser of clients that say no more than how many steps they made."""

    gamma: float = field(
        default=1.0, metadata={"gt": 0.0, "le": 1000.0, "doc": "Learning rate of the server."}
    )
    momentum: float = field(
        default=0.0,
        metadata={"ge": 0.0, "lt": 1.0, "doc": "Momentum of the clients' SGD; they are told."},
    )
    weighting: str = weighting_field()
    max_steps: int | None = field(
        default=None,
        metadata={
            "ge": 1,
            "le": 2**31 - 1,
            "doc": "An update with more local steps is refused; null: none is. Who claims many makes the round's "
            "step longer for all, so set it where sites are not trusted.",
        },
    )


@STRATEGIES.register("FedNova")
class FedNova(Strategy[FedNovaOptions]):
    """d_k = (x - y_k) / |a_k|, t = sum p_k |a_k|; x' = x - gamma t sum p_k d_k.

    |a_k| is the number of steps for SGD, (tau - rho (1 - rho^tau) / (1 - rho)) / (1 - rho) with momentum rho.
    A client with another optimiser (momentum of its own, proximal, decaying rate) sends it as `extra.fednova.norm`. Each
    update comes with `num_steps`. Of tau gradients each counts for at most 1 / (1 - rho) and one at least in full, so a
    norm below 1, or above 100 tau, which is a momentum of 0.99, is refused (EXTRA_RANGE). Integer buffers and running statistics are
    averaged with the weights p_k / |a_k|.
    """

    Options = FedNovaOptions
    paper = "2007.07481"
    needs_steps = True
    factor = 1.0

    def extras(self) -> tuple[Extra, ...]:
        said = (
            "the L1 norm of how much each local gradient counts, if it is not what num_steps says; "
            "in the SDK fl_client.fednova.norm makes it"
        )
        return (Extra("fednova.norm", said, required=False),)

    def admit(self, meta: UpdateMeta) -> Refused | None:
        steps, most = max(1, meta.num_steps or 1), self.options.max_steps
        if most is not None and steps > most:
            return Refused(f"num_steps is {steps}, the training's max_steps is {most}")
        norm = meta.extras.get("fednova.norm")
        longest = steps / (1 - max(HEAVY, self.options.momentum))
        if norm is None or 1 - ROUNDED <= norm <= longest * (1 + ROUNDED):
            return None
        return Refused(
            f"'extra.fednova.norm' is {norm!r}; with {steps} local steps it is from 1 to {longest:g}, or num_steps is wrong"
        )

    def weights(self, metas: Sequence[UpdateMeta], gram: "Tensor | None") -> Sequence[float]:
        sizes = sample_weights(metas, self.options.weighting)
        norms = [self._norm(meta) for meta in metas]
        top = max(norms)  # times top: where all norms are alike, the weights are whole numbers
        weights = [size * (top / norm) for size, norm in zip(sizes, norms, strict=True)]
        total = sum(sizes)
        steps = math.fsum(size * norm for size, norm in zip(sizes, norms, strict=True)) / total
        self.factor = self.options.gamma * steps * (math.fsum(weights) / top / total)
        return weights

    def _norm(self, meta: UpdateMeta) -> float:
        if "fednova.norm" in meta.extras:
            return meta.extras["fednova.norm"]
        tau, rho = max(1, meta.num_steps or 1), self.options.momentum
        return (tau - rho * (1 - rho**tau) / (1 - rho)) / (1 - rho)

    def update(self, x: "Tensor", y: "Tensor", state: "dict[str, Tensor]") -> "Tensor":
        return stride(x, y, self.factor)

    def client_config(self) -> dict[str, Any]:
        return {"momentum": self.options.momentum}
