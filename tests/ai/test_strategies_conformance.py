"""The published kit over every registered strategy, and what else ours promise about their input."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fl_server_ai.aggregation import STRATEGIES, UpdateMeta
from fl_server_ai.aggregation.engine import UpdateFile, aggregate
from fl_server_ai.aggregation.options import parse_options
from fl_server_ai.testing import CHECKS, conformance, furnished
from fl_server_ai.testing.rounds import Rounds
from fl_server_core.exceptions import AggregationException, Invalid
from tests.ai.test_aggregation import random_models

NAMES = list(STRATEGIES)
MOVING = {
    "FedAvgM", "FedAdagrad", "FedAdam", "FedYogi", "FedDyn", "IIADMM", "FedSGD", "FedPM",
    "qFedAvg", "FedAsync",
}  # fmt: skip
UNIFORM = {
    "FedMedian", "TrimmedMean", "SCAFFOLD", "FedDyn", "FedDGGA", "IIADMM", "ICEADMM", "FedPM",
    "FedBuff", "FedAsync",
}  # fmt: skip
COMPARING = {name for name in NAMES if STRATEGIES[name].needs_gram}
N = 11


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", NAMES)
def test_it_keeps_the_promises_of_every_strategy(name: str, check: str, tmp_path: Path) -> None:
    conformance(STRATEGIES[name], check, tmp_path)


@pytest.mark.parametrize("name", [name for name in NAMES if STRATEGIES[name].takes == "weights"])
def test_clients_that_did_not_move_keep_each_minus_zero(name: str, tmp_path: Path) -> None:
    rounds = Rounds(STRATEGIES[name], tmp_path)
    base = rounds.write({"w": torch.tensor([-0.0, 0.0, 1.5]), "h": torch.tensor([-0.0]).half()})
    fresh = rounds.alike(base)
    stale = [replace(one, meta=replace(one.meta, staleness=1, discount=0.5)) for one in fresh]

    made = [rounds.run(updates, base=base, neutral=True).weights for updates in (fresh, stale)]

    assert made == [base.read_bytes()] * 2


def test_fedprox_tells_its_clients_mu() -> None:
    kind = STRATEGIES["FedProx"]

    assert kind(parse_options(kind.Options, {"mu": 1})).client_config() == {"mu": 1.0}
    with pytest.raises(Invalid):
        parse_options(kind.Options, {"mu": -0.1})


@pytest.fixture
def updates(tmp_path: Path) -> list[UpdateFile]:
    base, *models = random_models(N + 1)
    save_file(base, tmp_path / "base")
    for index, model in enumerate(models):
        save_file(model, tmp_path / f"{index}")
    return [UpdateFile(tmp_path / f"{k}", UpdateMeta(f"{k:03}", k % 4 + 1)) for k in range(N)]


def run(name: str, updates: list[UpdateFile], block: int = 64, threads: int = 2) -> bytes:
    folder = updates[0].path.parent
    state = folder / "state"
    state.unlink(missing_ok=True)
    strategy = STRATEGIES[name]()
    aggregate(
        base=folder / "base",
        updates=furnished(strategy, updates, folder, neutral=True),
        out=folder / "out",
        strategy=strategy,
        state_out=state,
        block=block,
        threads=threads,
        device="cpu",
    )
    return (folder / "out").read_bytes() + (state.read_bytes() if state.exists() else b"")


@pytest.mark.parametrize("name", sorted(set(NAMES) - MOVING))
def test_updates_that_are_alike_give_back_their_own_bytes(
    name: str, updates: list[UpdateFile]
) -> None:
    alike = [UpdateFile(updates[0].path, file.meta) for file in updates]

    run(name, alike)

    assert (updates[0].path.parent / "out").read_bytes() == updates[0].path.read_bytes()


@pytest.mark.parametrize("name", sorted(set(NAMES) - MOVING))
def test_a_single_update_is_taken_over_or_refused_with_a_reason(
    name: str, updates: list[UpdateFile]
) -> None:
    if STRATEGIES[name]().fewest() > 1:
        with pytest.raises(AggregationException, match="needs at least"):
            run(name, updates[:1])
        return

    run(name, updates[:1])

    assert (updates[0].path.parent / "out").read_bytes() == updates[0].path.read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_integer_buffers_follow_the_weights_of_the_rule(
    name: str, updates: list[UpdateFile]
) -> None:
    run(name, updates)

    got = load_file(updates[0].path.parent / "out")["d.count"].numpy()
    rows = np.stack([load_file(file.path)["d.count"].numpy() for file in updates])
    if name in COMPARING:
        # Some convex combination of what the chosen ones sent.
        assert (got >= rows.min(axis=0)).all()
        assert (got <= rows.max(axis=0)).all()
        return
    sizes = [file.meta.num_examples for file in updates]
    mean = np.average(rows, 0, None if name in UNIFORM else sizes)
    np.testing.assert_array_equal(got, np.rint(mean))
