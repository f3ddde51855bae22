"""What every registered strategy promises about its input, beyond tests/ai/test_plugins.py."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fl_server_ai.aggregation import STRATEGIES, UpdateMeta
from fl_server_ai.aggregation.engine import UpdateFile, aggregate
from fl_server_ai.aggregation.options import parse_options
from fl_server_core.exceptions import AggregationException
from tests.ai.strategy_files import furnished
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
        updates=furnished(strategy, updates, folder),
        out=folder / "out",
        strategy=strategy,
        state_out=state,
        block=block,
        threads=threads,
        device="cpu",
    )
    return (folder / "out").read_bytes() + (state.read_bytes() if state.exists() else b"")


@pytest.mark.parametrize("name", NAMES)
def test_order_blocks_and_threads_never_show(name: str, updates: list[UpdateFile]) -> None:
    made = {
        run(name, order, block, threads)
        for order, block, threads in [
            (updates, 64, 1),
            (updates[::-1], 1, 2),
            (updates[5:] + updates[:5], 7, 3),
            (updates, 131_072, 2),
        ]
    }

    assert len(made) == 1


@pytest.mark.parametrize("name", NAMES)
def test_only_the_proportions_of_sample_sizes_count(name: str, updates: list[UpdateFile]) -> None:
    more = [
        UpdateFile(file.path, UpdateMeta(file.meta.participant, file.meta.num_examples * 4))
        for file in updates
    ]

    assert run(name, updates) == run(name, more)


@pytest.mark.parametrize("name", NAMES)
def test_inputs_are_never_written(name: str, updates: list[UpdateFile]) -> None:
    for file in updates:
        file.path.chmod(0o400)
    before = [file.path.read_bytes() for file in updates]

    run(name, updates)

    assert [file.path.read_bytes() for file in updates] == before


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


@pytest.mark.parametrize("name", NAMES)
def test_a_number_that_is_none_never_ends_up_in_the_model(name: str, tmp_path: Path) -> None:
    updates = []
    save_file({"w": torch.zeros(5)}, tmp_path / "base")
    for k in range(N):
        save_file({"w": torch.full((5,), 1.0 + k / 100)}, tmp_path / f"{k}")
        updates.append(UpdateFile(tmp_path / f"{k}", UpdateMeta(f"{k:03}", 1)))
    save_file({"w": torch.tensor([1.0, torch.nan, torch.inf, 1.0, 1.0])}, tmp_path / "3")

    try:
        run(name, updates)
    except AggregationException as refusal:
        assert "003" in str(refusal)  # noqa: PT017 - either is fine
    else:
        assert torch.isfinite(load_file(tmp_path / "out")["w"]).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_whole_number_will_do_for_a_float(name: str) -> None:
    kind = STRATEGIES[name].Options
    ones = {key: 1 for key in ("eta", "tau", "server_lr", "nu", "C") if hasattr(kind(), key)}

    options = parse_options(kind, ones)

    assert all(isinstance(getattr(options, key), float) for key in ones)
