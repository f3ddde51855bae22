"""P1: FedAvg on FLamby's Fed-Heart-Disease (arXiv:2210.04620), every published cell."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fl_client
from benchmarks.papers.data import Heart, Part
from benchmarks.papers.federation import Federation
from benchmarks.papers.report import Outcome, Row, Tell
from fl_client.torch_support import get_weights, load_weights

ROUNDS, UPDATES, BATCH, RATE = 15, 100, 4, 0.001
PUBLISHED = {  # test accuracy by seed: the four hospitals, then all patients
    42: (0.7596153846, 0.6966292135, 0.6875, 0.6222222222, 0.7519685039),
    43: (0.7211538462, 0.7415730337, 0.75, 0.6666666667, 0.7637795276),
    44: (0.7403846154, 0.7528089888, 0.5, 0.5777777778, 0.7637795276),
    45: (0.7307692308, 0.6741573034, 0.75, 0.6222222222, 0.7007874016),
    46: (0.7019230769, 0.7303370787, 0.5625, 0.7111111111, 0.7598425197),
}


class Hospital(fl_client.Client):
    """Draws its batches from torch's global generator, and goes on in its data where the last round ended."""

    def __init__(self, part: Part, module: nn.Module) -> None:
        self.examples = len(part.y)
        self._module = copy.deepcopy(module)
        self._loader = DataLoader(TensorDataset(part.x, part.y), batch_size=BATCH, shuffle=True)
        self._batches = iter(self._loader)

    def _batch(self) -> Any:
        try:
            return next(self._batches)
        except StopIteration:
            self._batches = iter(self._loader)
            return next(self._batches)

    def fit(
        self, weights: dict[str, Any], config: dict[str, Any], context: fl_client.Context
    ) -> fl_client.FitResult:
        load_weights(self._module, weights)
        optimiser = torch.optim.SGD(self._module.parameters(), lr=RATE)
        for _ in range(UPDATES):
            x, y = self._batch()
            optimiser.zero_grad()
            nn.functional.binary_cross_entropy(self._module(x).squeeze(1), y).backward()
            optimiser.step()
        return fl_client.FitResult(get_weights(self._module), num_examples=self.examples)


def network() -> nn.Module:
    """14 parameters."""
    return nn.Sequential(nn.Linear(13, 1), nn.Sigmoid())


def seeded(data: Heart, seed: int) -> tuple[nn.Module, list[Hospital]]:
    """The first model and the hospitals; torch's generator is then where their training begins."""
    torch.manual_seed(seed)
    module = network()
    hospitals = [Hospital(part, module) for part in data.train]
    torch.manual_seed(seed)
    return module, hospitals


def accuracies(data: Heart, weights: Mapping[str, Tensor]) -> tuple[float, ...]:
    """Of the four hospitals' test patients, then of all of them.

    Makes no network: its initial weights would come from the generator that the hospitals share.
    """
    return tuple(
        ((_said(weights, part.x) > 0.5) == (part.y > 0.5)).double().mean().item()
        for part in (*data.test, data.pooled)
    )


def _said(weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    return nn.functional.linear(x, weights["0.weight"], weights["0.bias"]).squeeze(1).sigmoid()


def trained(
    federation: Federation, data: Heart, seed: int, weighting: str = "samples", rounds: int = ROUNDS
) -> Iterator[dict[str, Tensor]]:
    """The global model after each round. Nobody else may draw from torch's generator meanwhile."""
    module, hospitals = seeded(data, seed)
    return federation.train(
        start=module.state_dict(),
        clients=hospitals,
        rounds=rounds,
        options={"weighting": weighting, "min_updates": len(hospitals)},
        at_a_time=1,
    )


def check(federation: Federation, data: Heart, tell: Tell) -> Outcome:
    """All five seeds; and once more with the unweighted mean, which must give something else."""
    outcome = Outcome()
    for seed, published in PUBLISHED.items():
        reached = {}
        for weighting in ("samples", "uniform"):
            name = f"seed {seed}, {weighting}"
            curve = outcome.curves.setdefault(name, [])
            for weights in trained(federation, data, seed, weighting):
                reached[weighting] = accuracies(data, weights)
                curve.append(100 * reached[weighting][-1])
                tell(f"P1 {name}", len(curve), curve[-1])
        weighted, unweighted = reached["samples"], reached["uniform"]
        outcome.rows += [
            Row("P1", f"seed {seed}", cells(published), cells(weighted), same(weighted, published)),
            Row("P1", f"seed {seed}, unweighted mean", "anything else", cells(unweighted),
                not same(unweighted, published)),
        ]  # fmt: skip
    return outcome


def same(values: tuple[float, ...], published: tuple[float, ...]) -> bool:
    """In all cells."""
    return all(abs(one - other) < 1e-9 for one, other in zip(values, published, strict=True))


def cells(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.4f}" for value in values)
