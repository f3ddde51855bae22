"""P2: rounds until 97 % on MNIST with the 2NN of McMahan et al. 2017 (arXiv:1602.05629), Table 1."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fl_client
from benchmarks.papers.data import Mnist, Part
from benchmarks.papers.federation import Federation
from benchmarks.papers.report import Outcome, Row, Tell
from fl_client.torch_support import get_weights, load_weights

CLIENTS, FRACTION, BATCH, RATE = 100, 0.1, 10, 0.1
SEEDS = (42, 43, 44)
GOAL = 97.0
EACH, MEAN, NON_IID = (45, 75), (50, 68), (240, 400)
LONGEST, LONGEST_NON_IID = 120, 600  # rounds after which it has failed


def network() -> nn.Sequential:
    """199,210 parameters, in torch's default initialisation."""
    return nn.Sequential(
        nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10)
    )


class Phone(fl_client.Client):
    """One pass over its images in batches of 10, in a new order each round."""

    def __init__(self, data: Mnist, mine: np.ndarray, seed: int) -> None:
        self._data = data
        self._mine = mine
        self._order = torch.Generator().manual_seed(seed)
        self._module = network()

    def fit(
        self, weights: dict[str, Any], config: dict[str, Any], context: fl_client.Context
    ) -> fl_client.FitResult:
        load_weights(self._module, weights)
        part = self._data.part(self._mine)
        optimiser = torch.optim.SGD(self._module.parameters(), lr=RATE)
        for chosen in torch.randperm(len(part.y), generator=self._order).split(BATCH):
            optimiser.zero_grad()
            nn.functional.cross_entropy(self._module(part.x[chosen]), part.y[chosen]).backward()
            optimiser.step()
        return fl_client.FitResult(get_weights(self._module), num_examples=len(part.y))


def dealt(labels: np.ndarray, seed: int, *, iid: bool) -> list[np.ndarray]:
    """Each client's 600 images: any of them, or two shards of 300 that are nearly all of one digit each."""
    draw = np.random.default_rng(seed)
    if iid:
        return np.split(draw.permutation(len(labels)), CLIENTS)
    shards = np.array_split(np.argsort(labels, kind="stable"), 2 * CLIENTS)
    order = draw.permutation(2 * CLIENTS)
    return [np.concatenate([shards[a], shards[b]]) for a, b in order.reshape(CLIENTS, 2)]


def crossing(accuracies: Sequence[float], goal: float = GOAL) -> float | None:
    """The round, from 1 and between rounds by a straight line, in which the best so far reaches the goal."""
    if accuracies and accuracies[0] >= goal:
        return 1.0
    best = np.maximum.accumulate(accuracies).tolist()
    for number, (before, after) in enumerate(pairwise(best), start=1):
        if after >= goal:
            return number + (goal - before) / (after - before)
    return None


def accuracy(module: nn.Module, weights: Mapping[str, Tensor], test: Part) -> float:
    """In percent."""
    load_weights(module, weights)
    with torch.no_grad():
        return 100 * (module(test.x).argmax(1) == test.y).double().mean().item()


def trained(
    federation: Federation, data: Mnist, seed: int, *, iid: bool, rounds: int
) -> Iterator[dict[str, Tensor]]:
    """The global model after each round; ten clients, drawn by the server, work in each."""
    torch.manual_seed(seed)
    module = network()
    shares = dealt(data.y.numpy(), seed, iid=iid)
    clients = [Phone(data, mine, 1000 * seed + k) for k, mine in enumerate(shares)]
    return federation.train(
        start=module.state_dict(),
        clients=clients,
        rounds=rounds,
        options={
            "sampling": "fraction",
            "client_fraction": FRACTION,
            "min_updates": round(FRACTION * CLIENTS),
        },
    )


def check(
    federation: Federation, data: Mnist, tell: Tell, *, seeds: Sequence[int] = SEEDS, non_iid: bool
) -> Outcome:
    """The IID row for each seed and their mean; the non-IID one for the first seed if asked for."""
    outcome = Outcome()
    test = data.test()
    module = network()

    def reached(name: str, seed: int, rounds: int, *, iid: bool) -> float | None:
        curve = outcome.curves.setdefault(name, [])
        for weights in trained(federation, data, seed, iid=iid, rounds=rounds):
            curve.append(accuracy(module, weights, test))
            tell(f"P2 {name}", len(curve), curve[-1])
            if curve[-1] >= GOAL:
                break
        return crossing(curve)

    found = [reached(f"IID, seed {seed}", seed, LONGEST, iid=True) for seed in seeds]
    outcome.rows += [
        _row(f"IID, seed {seed}", value, EACH) for seed, value in zip(seeds, found, strict=True)
    ]
    there = [value for value in found if value is not None]
    mean = statistics.fmean(there) if len(there) == len(found) else None
    if len(found) == len(SEEDS):
        outcome.rows.append(_row("IID, mean of three seeds (paper: 87)", mean, MEAN))
    if non_iid:
        value = reached(f"non-IID, seed {seeds[0]}", seeds[0], LONGEST_NON_IID, iid=False)
        outcome.rows.append(_row(f"non-IID, seed {seeds[0]} (paper: 664)", value, NON_IID))
    return outcome


def _row(what: str, value: float | None, bounds: tuple[int, int]) -> Row:
    least, most = bounds
    return Row(
        "P2",
        f"rounds to {GOAL:.0f} %, {what}",
        f"{least} to {most}",
        "never" if value is None else f"{value:.1f}",
        value is not None and least <= value <= most,
    )
