"""Running means and variances: no server's step may move them past the mean of the updates."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fl_client import statistics as clients
from fl_server_ai.aggregation import STRATEGIES, Strategy, UpdateMeta
from fl_server_ai.aggregation import statistics as servers
from fl_server_ai.aggregation.engine import UpdateFile, aggregate
from fl_server_ai.aggregation.options import parse_options
from fl_server_ai.testing import furnished

MOVING = [
    name
    for name, kind in ((name, STRATEGIES[name]) for name in STRATEGIES)
    if kind.takes == "weights" and kind.update is not Strategy.update
]
VAR = "bn.running_var"
N = 11


def vectors(**values: Sequence[float]) -> dict[str, torch.Tensor]:
    return {name.replace("__", "."): torch.tensor(list(value)) for name, value in values.items()}


def alike(value: float) -> dict[str, torch.Tensor]:
    """A variance and a weight of the same value."""
    return vectors(bn__running_var=[value], bn__weight=[value])


class Site:
    """A folder in which one strategy works, round after round, on models of several tensors."""

    def __init__(self, folder: Path, name: str, **options: Any) -> None:
        self.folder, self.kind = folder, STRATEGIES[name]
        self.options = parse_options(self.kind.Options, options)
        self.round, self.state = 0, Path()

    def write(self, name: str, model: Mapping[str, torch.Tensor]) -> Path:
        save_file(dict(model), self.folder / name)
        return self.folder / name

    def step(
        self,
        base: Mapping[str, torch.Tensor],
        models: Sequence[Mapping[str, torch.Tensor]],
        start: Mapping[str, torch.Tensor] | None = None,
        only: frozenset[str] | None = None,
        **more: Any,
    ) -> dict[str, torch.Tensor]:
        """Update k has k + 1 examples; the last one began with `start`, and has sent `only` these tensors."""
        self.round += 1
        files = [
            UpdateFile(self.write(f"{k}", model), UpdateMeta(f"{k:03}", k + 1))
            for k, model in enumerate(models)
        ]
        began = None if start is None else self.write("start", start)
        files[-1] = replace(files[-1], start=began, tensors=only)
        strategy = self.kind(self.options)
        before, self.state = self.state, self.folder / f"state-{self.round}"
        aggregate(
            base=self.write("base", base),
            updates=furnished(strategy, files, self.folder, self.round - 1),
            out=self.folder / "out",
            strategy=strategy,
            state_in=before if before.is_file() else None,
            state_out=self.state,
            device="cpu",
            **more,
        )
        return load_file(self.folder / "out")


STEPS = {  # strategy: means of the rounds' updates from 0.01 or 1 on, and the weight after the last
    "FedAdam": (0.01, [0.005], -0.013657),
    "FedAvgM": (1.0, [0.2, 0.2], -0.52),
    "FedDyn": (1.0, [0.4], -0.2),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_servers_step_moves_weights_and_gives_variances_their_mean(
    name: str, tmp_path: Path
) -> None:
    start, means, weight = STEPS[name]
    site, model = Site(tmp_path, name), alike(start)

    for mean in means:
        model = site.step(model, [alike(mean)] * 3)

    assert model["bn.weight"].item() == pytest.approx(weight, rel=1e-4)
    assert model[VAR].item() == torch.tensor(means[-1]).item()
    fresh = site.kind(site.options).initial_state()
    state = load_file(site.state)
    assert state
    for key, vector in state.items():  # the variance comes first in it
        assert vector[0].item() == pytest.approx(fresh.get(key.removesuffix(".0"), 0.0))
        assert vector[0] != vector[1]


def random_model(seed: int) -> dict[str, torch.Tensor]:
    """All of it between 0 and 1, in runs of two dtypes that statistics begin, end and interrupt."""
    generator = torch.Generator().manual_seed(seed)
    names = ["a.running_var", "b.weight", "c.running_mean", "c.running_var", "d", "e.moving_mean"]
    model = {name: torch.rand(33, generator=generator) for name in names}
    halves = {
        f"half.{name}": torch.rand(5, generator=generator).half() for name in ("running_var", "w")
    }
    return {**model, **halves, "count": torch.randint(9, (3,), generator=generator)}


def statistics(model: Mapping[str, torch.Tensor]) -> dict[str, bytes]:
    return {
        name: value.numpy().tobytes()
        for name, value in model.items()
        if "running" in name or "moving" in name
    }


@pytest.mark.parametrize("name", MOVING)
def test_no_step_leaves_the_range_of_what_was_there_and_what_came(
    name: str, tmp_path: Path
) -> None:
    site, model = Site(tmp_path, name), random_model(0)

    for round in range(2):
        models = [random_model(100 * (round + 1) + k) for k in range(N)]
        made = site.step(model, models, block=100)

        for key in statistics(model):
            all_of_them = torch.stack([model[key], *(one[key] for one in models)]).double()
            least, most = all_of_them.min(0).values, all_of_them.max(0).values
            assert ((least <= made[key].double()) & (made[key].double() <= most)).all(), key
        model = made


@pytest.mark.parametrize(
    ("name", "options"), [("FedAvgM", {"server_lr": 0.5}), ("FedAdam", {}), ("FedYogi", {})]
)
def test_they_are_fedavgs_byte_for_byte_with_its_blocks_and_with_others(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    base, models = random_model(0), [random_model(k) for k in range(1, 6)]

    for only in (None, frozenset({"b.weight", "c.running_mean"})):
        wanted = Site(tmp_path, "FedAvg").step(base, models, only=only)
        for block, threads in ((131_072, 1), (7, 3)):
            site = Site(tmp_path, name, **options)
            made = site.step(base, models, only=only, block=block, threads=threads)

            assert statistics(made) == statistics(wanted)
            assert not torch.equal(made["b.weight"], wanted["b.weight"])


def test_a_gradient_says_nothing_of_them(tmp_path: Path) -> None:
    base = random_model(0)

    made = Site(tmp_path, "FedSGD").step(base, [random_model(1), random_model(2)])

    assert statistics(made) == statistics(base)
    assert not torch.equal(made["d"], base["d"])


@pytest.mark.parametrize("block", [8, 131_072])
def test_stale_updates_are_moved_to_the_current_model_without_them(
    block: int, tmp_path: Path
) -> None:
    base, older, own = random_model(0), random_model(1), random_model(2)

    made = Site(tmp_path, "FedAvg").step(base, [own], older, block=block)

    assert statistics(made) == statistics(own)
    moved = own["d"].double() + (base["d"].double() - older["d"].double())
    np.testing.assert_array_equal(made["d"], moved.float())


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("bn.running_mean", True),
        ("running_var", True),
        ("layers/bn/moving_variance", True),
        ("bn.weight", False),
        ("my_running_mean", False),
        ("running_mean.scale", False),
    ],
)
def test_the_sdk_and_the_server_agree_on_what_statistics_are(name: str, is_one: bool) -> None:
    assert (clients.is_statistic(name), servers.is_statistic(name)) == (is_one, is_one)
