"""Inexact consensus ADMM, primal and dual sent: Zhou, Li 2021, https://arxiv.org/abs/2110.15318."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fl_server_ai.aggregation import STRATEGIES, Extra, Strategy, UpdateMeta
from fl_server_ai.aggregation.strategies.iiadmm import IIADMMOptions
from fl_server_ai.aggregation.strategy import FAR

if TYPE_CHECKING:
    from torch import Tensor

APART = 1000  # times; residual balancing doubles a penalty ten times before it is that far off


@STRATEGIES.register("ICEADMM")
class ICEADMM(Strategy[IIADMMOptions]):
    """x' = sum(rho_k z_k + l_k) / sum(rho_k), over the round's updates.

    A client sends its primal z_k as the weights, its dual l_k as `extra.admm.dual.<tensor>`, and its penalty as
    `extra.admm.rho` if it is not the training's, a thousandth to a thousand times that. Sample sizes do not count. Integer buffers and running statistics are averaged with the
    weights rho_k. In the mode sync, without late updates.
    """

    Options = IIADMMOptions
    paper = "2110.15318"
    only_fresh = "primals and duals count alike, and late primals count less"
    ratio = 0.0

    def extras(self) -> tuple[Extra, ...]:
        rho = self.options.rho
        said = "the client's penalty, between a thousandth and a thousand times the training's"
        return (
            Extra(
                "admm.dual",
                "the client's dual variable",
                per_tensor=True,
                minimum=-FAR * rho,
                maximum=FAR * rho,
            ),
            Extra("admm.rho", said, required=False, minimum=rho / APART, maximum=rho * APART),
        )

    def weights(self, metas: Sequence[UpdateMeta], gram: "Tensor | None") -> Sequence[float]:
        penalties = [meta.extras.get("admm.rho", self.options.rho) for meta in metas]
        self.ratio = len(metas) / math.fsum(penalties)
        return penalties

    def update(self, x: "Tensor", y: "Tensor", state: "dict[str, Tensor]") -> "Tensor":
        return y - (0 - state["admm.dual"]) * self.ratio  # -0 stays -0

    def client_config(self) -> dict[str, Any]:
        return {"rho": self.options.rho}
