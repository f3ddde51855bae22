"""Weights that follow generalisation gaps: Zhang et al., Federated Domain Generalization With Generalization Adjustment, CVPR 2023."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fl_server_ai.aggregation import STRATEGIES, Extra, Strategy, UpdateMeta

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class FedDGGAOptions:
    """How far the weights move, and which way is better."""

    step: float = field(
        default=0.2,
        metadata={"gt": 0.0, "le": 1.0, "doc": "The first step d; it falls to 0 over the rounds."},
    )
    metric: str = field(
        default="loss",
        metadata={
            "choices": ("loss", "accuracy"),
            "doc": "What clients report: less is better for a loss, more for an accuracy.",
        },
    )


@STRATEGIES.register("FedDGGA")
class FedDGGA(Strategy[FedDGGAOptions]):
    """x' = sum a_k y_k / sum a_k; a_k starts at 1/N and moves by d_r (G_k - mean G) / max|G - mean G|, in [0, 1].

    G_k is the gap between the global model of the round before and the client's own model at its end, on the client's
    validation data; d_r = d - (r - 1) d / R in adjustment r of R rounds. Each update brings the metric of the
    model it began with (`extra.feddgga.received`) and of the one it ends with (`extra.feddgga.trained`). Who
    lacks one of the two keeps its weight, and all are scaled to sum 1. Sample sizes do not count.
    """

    Options = FedDGGAOptions
    paper = (
        "https://openaccess.thecvf.com/content/CVPR2023/html/Zhang_Federated_Domain_"
        "Generalization_With_Generalization_Adjustment_CVPR_2023_paper.html"
    )
    knows_participants = True

    def __init__(self, options: FedDGGAOptions | None = None) -> None:
        super().__init__(options)
        self.shares: dict[str, float] = {}
        self.trained: dict[str, float] = {}
        self.adjustments = 0

    def extras(self) -> tuple[Extra, ...]:
        return (
            Extra("feddgga.received", "the metric of the global model on local validation data"),
            Extra("feddgga.trained", "the metric of the model after local training"),
        )

    def weights(self, metas: Sequence[UpdateMeta], gram: "Tensor | None") -> Sequence[float]:
        population = max(len(metas), self.facts.population, len(self.shares))
        for meta in metas:
            self.shares.setdefault(meta.participant, 1 / population)
        gaps = {
            meta.participant: meta.extras["feddgga.received"] - self.trained[meta.participant]
            for meta in metas
            if meta.participant in self.trained
        }
        if gaps:
            self._adjust(gaps)
        self.trained |= {meta.participant: meta.extras["feddgga.trained"] for meta in metas}
        weights = [self.shares[meta.participant] for meta in metas]
        return weights if any(weights) else [1.0] * len(metas)

    def _adjust(self, gaps: Mapping[str, float]) -> None:
        self.adjustments += 1
        mean = math.fsum(gaps.values()) / len(gaps)
        away = {who: gap - mean for who, gap in gaps.items()}
        widest = max(abs(value) for value in away.values())
        if not widest:
            return
        done = (self.adjustments - 1) / self.facts.rounds if self.facts.rounds else 0.0
        sign = 1 if self.options.metric == "loss" else -1
        step = sign * self.options.step * (1 - done) / widest
        moved = {
            who: min(1.0, max(0.0, share + step * away.get(who, 0.0)))
            for who, share in self.shares.items()
        }
        if total := math.fsum(moved.values()):
            self.shares = {who: share / total for who, share in moved.items()}

    def state_dict(self) -> dict[str, Any]:
        return {
            "shares": self.shares,
            "trained": self.trained,
            "adjustments": self.adjustments,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.shares, self.trained = dict(state["shares"]), dict(state["trained"])
        self.adjustments = state["adjustments"]
