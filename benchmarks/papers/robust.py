"""P3: accuracy under eight hostile workers of forty, by rule of aggregation."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

import fl_client
from benchmarks.papers.data import Mnist, Part
from benchmarks.papers.federation import Federation
from benchmarks.papers.report import Outcome, Row, Tell

WORKERS, IMAGES, HOSTILE, ROUNDS, RATE, TESTED = 40, 200, 8, 20, 0.5, 5_000
TOLERANCE = 0.3
RULES: dict[str, tuple[str, dict[str, Any], int, float]] = {  # method, options, hostile, published
    "mean": ("FedAvg", {}, HOSTILE, 11.4),
    "coordinate median": ("FedMedian", {}, HOSTILE, 82.7),
    "trimmed mean, 8 each side": ("TrimmedMean", {"beta": 0.2}, HOSTILE, 82.8),
    "Krum, f = 8": ("Krum", {"f": 8}, HOSTILE, 78.6),
    "multi-Krum, f = 8, m = 32": ("MultiKrum", {"f": 8, "m": 32}, HOSTILE, 83.6),
    "mean, nobody hostile": ("FedAvg", {}, 0, 83.6),
}


class Labourer(fl_client.Client):
    """One step of gradient descent on all of its images, or, if hostile, ten times as far uphill."""

    def __init__(self, part: Part, *, hostile: bool) -> None:
        self._part = part
        self._step = -10 * RATE if hostile else RATE

    def fit(
        self, weights: dict[str, Any], config: dict[str, Any], context: fl_client.Context
    ) -> fl_client.FitResult:
        now = {name: torch.from_numpy(value) for name, value in weights.items()}
        update = {name: now[name] - self._step * g for name, g in gradient(now, self._part).items()}
        return fl_client.FitResult(
            {name: value.numpy() for name, value in update.items()}, num_examples=IMAGES
        )


def gradient(weights: Mapping[str, Tensor], part: Part) -> dict[str, Tensor]:
    """Of the mean cross-entropy of softmax(x W^T + b)."""
    leaves = {name: value.clone().requires_grad_() for name, value in weights.items()}
    loss = functional.cross_entropy(
        functional.linear(part.x, leaves["weight"], leaves["bias"]), part.y
    )
    loss.backward()
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def zero() -> dict[str, Tensor]:
    """7,850 parameters."""
    return {"weight": torch.zeros(10, 784), "bias": torch.zeros(10)}


def dealt(data: Mnist) -> list[Part]:
    """Each worker's 200 images."""
    chosen = np.random.default_rng(9).permutation(60_000)[: WORKERS * IMAGES]
    order = np.random.default_rng(0).permutation(WORKERS * IMAGES)
    return [data.part(mine) for mine in np.split(chosen[order], WORKERS)]


def accuracy(weights: Mapping[str, Tensor], test: Part) -> float:
    """In percent."""
    said = functional.linear(test.x, weights["weight"], weights["bias"]).argmax(1)
    return 100 * (said == test.y).double().mean().item()


def trained(
    federation: Federation, parts: list[Part], rule: str, rounds: int = ROUNDS
) -> Iterator[dict[str, Tensor]]:
    """The global model after each round."""
    method, options, hostile, _ = RULES[rule]
    clients = [Labourer(part, hostile=k < hostile) for k, part in enumerate(parts)]
    return federation.train(
        start=zero(),
        clients=clients,
        rounds=rounds,
        method=method,
        options={"min_updates": WORKERS, **options},
    )


def check(federation: Federation, data: Mnist, tell: Tell) -> Outcome:
    outcome = Outcome()
    parts, test = dealt(data), data.test(TESTED)
    for rule, (*_, published) in RULES.items():
        curve = outcome.curves.setdefault(rule, [])
        for weights in trained(federation, parts, rule):
            curve.append(accuracy(weights, test))
            tell(f"P3 {rule}", len(curve), curve[-1])
        passed = abs(curve[-1] - published) <= TOLERANCE
        outcome.rows.append(
            Row("P3", rule, f"{published} % ± {TOLERANCE}", f"{curve[-1]:.2f} %", passed)
        )
    return outcome
