"""Fairer averages, worse sites count more: Li et al. 2020, https://arxiv.org/abs/1905.10497."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fl_server_ai.aggregation import STRATEGIES, Extra, Strategy, UpdateMeta
from fl_server_ai.aggregation.geometry import compared, stride

if TYPE_CHECKING:
    from torch import Tensor

TINY = 1e-10  # added to each loss, as in the authors' code: F^(q - 1) has a pole at 0


@dataclass(frozen=True)
class QFedAvgOptions:
    """How fair, and how the clients stepped."""

    q: float = field(
        default=0.2,
        metadata={
            "ge": 0.0,
            "le": 100.0,
            "doc": "0: the plain mean; more: worse sites count more.",
        },
    )
    client_lr: float = field(
        default=0.1,
        metadata={"gt": 0.0, "le": 1000.0, "doc": "The clients' learning rate; 1/L in the paper."},
    )


@STRATEGIES.register("qFedAvg")
class QFedAvg(Strategy[QFedAvgOptions]):
    """g_k = L (x - y_k), D_k = F_k^q g_k, h_k = q F_k^(q-1) |g_k|^2 + L F_k^q; x' = x - sum D_k / sum h_k.

    F_k is the loss of the *global* model on the client's data, before training (`extra.qfedavg.loss`); L is
    1 / client_lr. Who claims a large loss counts most: for sites that can be trusted. Sample sizes do not count. Integer buffers and running statistics are averaged with the weights F_k^q.
    """

    Options = QFedAvgOptions
    paper = "1905.10497"
    needs_gram = True
    factor = 1.0

    def extras(self) -> tuple[Extra, ...]:
        said = "the loss of the global model on the client's data, before training"
        return (Extra("qfedavg.loss", said, minimum=0.0),)

    def weights(self, metas: Sequence[UpdateMeta], gram: "Tensor | None") -> Sequence[float]:
        q, lipschitz = self.options.q, 1 / self.options.client_lr
        losses = [meta.extras["qfedavg.loss"] + TINY for meta in metas]
        top = max(losses)  # all powers are divided by top^q, so that none overflows
        weights = [(loss / top) ** q for loss in losses]
        squares = compared(gram).diagonal().tolist()
        total = math.fsum(
            weight * (q * lipschitz**2 * square / loss + lipschitz)
            for weight, loss, square in zip(weights, losses, squares, strict=True)
        )
        self.factor = lipschitz * math.fsum(weights) / total
        return weights

    def update(self, x: "Tensor", y: "Tensor", state: "dict[str, Tensor]") -> "Tensor":
        return stride(x, y, self.factor)
