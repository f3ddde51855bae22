"""A round that several workers share: slices that are joined are the bytes of one worker."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fl_server_ai.aggregation import STRATEGIES, UpdateMeta
from fl_server_ai.aggregation.blocks import FLOATS, Source, layout_of
from fl_server_ai.aggregation.combination import Inputs
from fl_server_ai.aggregation.engine import UpdateFile, aggregate
from fl_server_ai.aggregation.slices import (
    SliceChanged,
    SliceFile,
    join,
    read_survey,
    spans_of,
    survey_shares,
    write_slice,
    write_survey,
)
from fl_server_ai.testing import furnished
from fl_server_core.exceptions import AggregationException
from tests.ai.test_aggregation import random_models

NAMES = list(STRATEGIES)
N = 11


def normalising(n: int) -> list[dict[str, torch.Tensor]]:
    """Models with statistics among their halves and doubles."""
    return [
        {**model, "a.running_mean": model["b.half"] / 2, "c.running_var": model["c.double"].abs()}
        for model in random_models(n)
    ]


@pytest.fixture
def updates(tmp_path: Path) -> list[UpdateFile]:
    base, older, *models = normalising(N + 2)
    save_file(base, tmp_path / "base")
    save_file(older, tmp_path / "older")
    for index, model in enumerate(models):
        save_file(model, tmp_path / f"{index}")
    return [UpdateFile(tmp_path / f"{k}", UpdateMeta(f"{k:03}", k % 4 + 1)) for k in range(N)]


def prepared(name: str, updates: Sequence[UpdateFile], population: int = 20, **more: Any) -> Inputs:
    strategy = STRATEGIES[name]()
    folder = updates[0].path.parent
    files = furnished(strategy, updates, folder)
    strategy.facts = replace(strategy.facts, population=population)
    return Inputs(folder / "base", files, strategy, block=64, **more)


def alone(inputs: Inputs, folder: Path, name: str = "alone") -> tuple[bytes, bytes, dict[str, Any]]:
    out, state = folder / name, folder / f"{name}.state"
    made = aggregate(
        base=inputs.base,
        updates=inputs.updates,
        out=out,
        strategy=inputs.strategy,
        state_in=inputs.state_in,
        state_out=state,
        buffer_policy=inputs.buffer_policy,
        device="cpu",
    )
    return out.read_bytes(), state.read_bytes() if state.exists() else b"", made.scalars


def shared(
    again: Any, folder: Path, of: int, name: str = "shared"
) -> tuple[bytes, bytes, dict[str, Any]]:
    """The same by as many workers as there are slices, each with a strategy of its own; last one first."""
    shares = survey_shares(again().strategy, of)
    surveys = [folder / f"{name}.survey.{index}" for index in range(shares)]
    for index in reversed(range(shares)):
        write_survey(again(), index=index, of=shares, out=surveys[index], device="cpu", threads=1)
    slices = []
    for index in reversed(range(of)):
        path = folder / f"{name}.slice.{index}"
        made = write_slice(
            again(), read_survey(surveys), index=index, of=of, out=path, device="cpu", threads=1
        )
        slices.insert(0, SliceFile(path, made.digest, made.recipe))
    out, state = folder / name, folder / f"{name}.state"
    result = join(again(), read_survey(surveys), slices, out=out, state_out=state)
    return out.read_bytes(), state.read_bytes() if state.exists() else b"", result.scalars


@pytest.mark.parametrize("name", NAMES)
def test_slices_make_the_bytes_of_one_worker_in_every_round(
    name: str, updates: list[UpdateFile], tmp_path: Path
) -> None:
    first = alone(prepared(name, updates), tmp_path)
    state = tmp_path / "alone.state"
    before = {"state_in": state, "population": 30} if state.exists() else {}
    second = alone(prepared(name, updates, **before), tmp_path, "second")

    for of in (2, 7):
        assert shared(lambda: prepared(name, updates), tmp_path, of, f"first-{of}") == first
    made = shared(lambda: prepared(name, updates, **before), tmp_path, 3, "of-3")
    assert made == second


@pytest.mark.parametrize(
    ("name", "block"), [("SCAFFOLD", "c"), ("FedDyn", "h"), ("IIADMM", "duals")]
)
@pytest.mark.parametrize("known", [True, False])
def test_means_over_all_participants_follow_their_number_and_sums_stay(
    name: str, block: str, known: bool, updates: list[UpdateFile], tmp_path: Path
) -> None:
    alone(prepared(name, updates, 11), tmp_path, "first")
    alone(prepared(name, updates, 22), tmp_path, "fresh")
    first, fresh = load_file(tmp_path / "first.state"), load_file(tmp_path / "fresh.state")
    if not known:  # as servers wrote it before
        save_file(first, tmp_path / "first.state", {"scalars": "{}"})

    alone(prepared(name, updates, 22, state_in=tmp_path / "first.state"), tmp_path, "second")

    second, scale = load_file(tmp_path / "second.state"), 0.5 if known and block != "duals" else 1.0
    for run, vector in second.items():
        torch.testing.assert_close(vector, first[run] * scale + fresh[run])


def masked(updates: Sequence[UpdateFile]) -> list[UpdateFile]:
    """Every other update leaves out numbers, and one of those whole tensors."""
    some = np.random.default_rng(5)
    runs = [run for run in layout_of(Source(updates[0].path, "0")).runs if run.dtype in FLOATS]
    changed = list(updates)
    for k in range(0, len(updates), 2):
        path = updates[k].path.with_suffix(".mask")
        bits = {
            f"mask.{index}": torch.from_numpy(some.integers(0, 2, run.count, np.uint8))
            for index, run in enumerate(runs)
        }
        save_file(bits, path)
        changed[k] = replace(changed[k], mask=path)
    changed[2] = replace(changed[2], tensors=frozenset({"a.weight", "d.count"}))
    return changed


@pytest.mark.parametrize("kind", ["masks and tensors", "averaged", "stale", "keep", "max"])
def test_whatever_updates_leave_out_or_start_from_slices_make_the_same(
    kind: str, updates: list[UpdateFile], tmp_path: Path
) -> None:
    more: dict[str, Any] = {}
    name = "FedAvg" if kind == "averaged" else "FedAvgM"
    if kind in ("masks and tensors", "averaged"):
        updates = masked(updates)
    elif kind == "stale":
        updates[1] = replace(
            updates[1],
            start=tmp_path / "older",
            meta=replace(updates[1].meta, staleness=1, discount=0.5),
        )
    else:
        more = {"buffer_policy": kind}

    expected = alone(prepared(name, updates, **more), tmp_path)

    for of in (2, 3, 7):
        made = shared(lambda: prepared(name, updates, **more), tmp_path, of, f"of-{of}")
        assert made == expected


@pytest.mark.parametrize("of", [1, 2, 3, 7, 40, 5000])
def test_every_number_belongs_to_one_slice(of: int, updates: list[UpdateFile]) -> None:
    source = Source(updates[0].path, "0")
    layout = layout_of(source)

    spans = [spans_of(layout, index, of) for index in range(of)]

    for run, column in zip(layout.runs, zip(*spans, strict=True), strict=True):
        numbers = [number for first, last in column for number in range(first, last)]
        assert numbers == list(range(run.count))
    source.close()


def damage(one: SliceFile) -> SliceFile:
    data = bytearray(one.path.read_bytes())
    data[-1] ^= 1
    one.path.write_bytes(data)
    return one


def shorten(one: SliceFile) -> SliceFile:
    one.path.write_bytes(one.path.read_bytes()[:-1])
    return one


@pytest.mark.parametrize("harm", [damage, shorten, lambda one: replace(one, recipe="another")])
def test_a_slice_that_is_not_what_was_made_is_named_and_nothing_is_written(
    harm: Any, updates: list[UpdateFile], tmp_path: Path
) -> None:
    slices = []
    for index in range(3):
        path = tmp_path / f"slice-{index}"
        survey = read_survey([])
        made = write_slice(
            prepared("FedAdam", updates), survey, index=index, of=3, out=path, device="cpu"
        )
        slices.append(SliceFile(path, made.digest, made.recipe))
    slices[1] = harm(slices[1])

    with pytest.raises(SliceChanged) as caught:
        join(
            prepared("FedAdam", updates),
            survey,
            slices,
            out=tmp_path / "out",
            state_out=tmp_path / "state",
        )

    assert caught.value.index == 1
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*.part"))


def test_a_number_that_is_none_is_found_by_the_slice_it_lies_in(
    updates: list[UpdateFile], tmp_path: Path
) -> None:
    broken = normalising(1)[0]
    broken["a.weight"][3, 3] = torch.inf
    save_file(broken, updates[4].path)
    found = []

    for index in range(4):
        try:
            write_slice(
                prepared("FedAvg", updates),
                read_survey([]),
                index=index,
                of=4,
                out=tmp_path / f"slice-{index}",
                device="cpu",
            )
        except AggregationException as error:
            found.append(str(error))

    assert len(found) == 1
    assert "004" in found[0]
    assert "'a.weight'" in found[0]
