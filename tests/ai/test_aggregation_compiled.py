"""The compiled loops make the bytes that torch and NumPy make, and nothing needs them."""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from safetensors.torch import save_file

from fl_server_ai.aggregation import STRATEGIES, UpdateMeta, compiled
from fl_server_ai.aggregation.blocks import Run, Source, layout_of
from fl_server_ai.aggregation.distances import DistanceWorker
from fl_server_ai.aggregation.engine import UpdateChanged, UpdateFile, aggregate
from fl_server_ai.aggregation.fold import Folder
from fl_server_ai.aggregation.order import mean_of, ranked
from tests.ai.loops import LOOPS, use
from tests.ai.test_aggregation_transfer import CASES, rounds_on

CPU = torch.device("cpu")
FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]
WHOLE = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}


def sources(folder: Path, rows: Sequence[torch.Tensor]) -> tuple[list[Source], Run]:
    found = []
    for index, row in enumerate(rows):
        save_file({"w": row}, folder / str(index))
        found.append(Source(folder / str(index), str(index)))
    return found, layout_of(found[0]).runs[0]


@pytest.mark.parametrize("case", CASES)
def test_two_rounds_of_every_rule_are_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    made = []

    for loops in LOOPS:
        use(loops, monkeypatch)
        folder = tmp_path / loops
        folder.mkdir()
        made.append(rounds_on(folder, case, "cpu"))

    for plain, fast in zip(*made, strict=True):
        assert fast.all == plain.all
        assert fast.scalars == plain.scalars


@settings(max_examples=60)
@given(data=some.data(), n=some.integers(2, 9))
def test_sums_are_those_of_torch_to_the_last_bit(
    tmp_path_factory: pytest.TempPathFactory, data: some.DataObject, n: int
) -> None:
    numbers = some.floats(width=32, allow_nan=False, allow_infinity=False)
    rows = [data.draw(some.lists(numbers, min_size=7, max_size=7)) for _ in range(n)]
    kinds = some.integers(1, 2**20) | some.floats(1e-3, 1e3)
    weights = [float(data.draw(kinds)) for _ in range(n)]
    files, run = sources(
        tmp_path_factory.mktemp("sums"), [torch.tensor(row, dtype=torch.float32) for row in rows]
    )
    made = []

    for loops in LOOPS:
        with pytest.MonkeyPatch.context() as patch:
            use(loops, patch)
            made.append(Folder(CPU, 7, 4).mean(files, weights, run, 0, 7).clone())
    for file in files:
        file.close()

    assert torch.equal(*(each.view(torch.int64) for each in made))


def test_what_torch_is_in_doubt_about_is_in_doubt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than a tile, with terms that cancel: what is not looked at again is right without it."""
    generator = torch.Generator().manual_seed(1)
    count = 70_000
    rows = [torch.randn(count, generator=generator) for _ in range(6)]
    rows[5][::3] = -sum(rows[k][::3] * (k + 1) for k in range(5)) / 6
    files, run = sources(tmp_path, rows)
    weights = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    made = []

    for loops in LOOPS:
        use(loops, monkeypatch)
        made.append(Folder(CPU, count, 4).rounded(files, weights, run, 0, count).float())
    for file in files:
        file.close()

    assert torch.equal(*(each.view(torch.int32) for each in made))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("n", [1, 2, 9, 40, 101])
def test_ranks_and_their_means_are_those_of_numpy(
    monkeypatch: pytest.MonkeyPatch, n: int, dtype: torch.dtype
) -> None:
    generator = np.random.default_rng(n)
    odd = [0.0, -0.0, 1.0, -1.0, math.nan, -math.nan, math.inf, -math.inf, 2.0**-149, 3.0]
    rows = torch.from_numpy(generator.choice(odd, size=(n, 150))).to(dtype)
    rows[:, 60:] = torch.from_numpy(generator.standard_normal((n, 90))).to(dtype)
    made: list[list[Any]] = []

    for loops in LOOPS:
        use(loops, monkeypatch)
        ranks = ranked(rows, n // 3, n - n // 3).clone()
        made.append([ranks.view(WHOLE[dtype.itemsize]), mean_of(ranks).view(torch.int64)[60:]])

    assert torch.equal(made[0][0], made[1][0])
    assert torch.equal(made[0][1], made[1][1])


@pytest.mark.parametrize("size", [1.0, 1e-25, 1e25, 1e38])
def test_distances_are_those_of_float64(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: float
) -> None:
    generator = torch.Generator().manual_seed(3)
    rows = [size * torch.randn(20_000, generator=generator).clamp(-3, 3) for _ in range(5)]
    files, run = sources(tmp_path, rows)
    wide = torch.stack(rows).double()
    exact = -(torch.cdist(wide, wide, compute_mode="donot_use_mm_for_euclid_dist") ** 2) / 2
    use("compiled", monkeypatch)

    got = DistanceWorker(CPU, 5, compiled.kernels()).partial(files, [(run, 0, 20_000)])
    for file in files:
        file.close()

    torch.testing.assert_close(got, exact, rtol=1e-6, atol=0)
    assert torch.equal(got, got.T)


@pytest.mark.parametrize("rule", ["FedAvg", "FedMedian"])
def test_a_file_that_gets_shorter_names_its_sender(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: str
) -> None:
    use("compiled", monkeypatch)
    loops: Any = compiled.kernels()
    name = {"FedAvg": "add_up", "FedMedian": "read_rows"}[rule]
    loop = getattr(loops, name)
    paths = [tmp_path / str(k) for k in range(5)]
    for path in paths:
        save_file({"w": torch.ones(300)}, path)

    def shortened(*args: Any) -> Any:
        with paths[3].open("r+b") as file:
            file.truncate(paths[3].stat().st_size - 8)
        return loop(*args)

    monkeypatch.setattr(loops, name, shortened)
    updates = [UpdateFile(path, UpdateMeta(f"p{k}", 1)) for k, path in enumerate(paths)]

    with pytest.raises(UpdateChanged, match="participant p3 has become shorter"):
        aggregate(base=paths[0], updates=updates, out=tmp_path / "out", strategy=STRATEGIES[rule]())


def test_small_models_do_not_wait_for_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_loaded", [])

    compiled.prepare(compiled.WORTH - 1)
    assert compiled.kernels() is None

    compiled.prepare(compiled.WORTH)
    assert compiled.kernels() is not None


def test_without_numba_there_are_no_loops_and_no_complaint(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compiled, "_loaded", [])
    monkeypatch.setitem(sys.modules, "numba", None)

    compiled.prepare(compiled.WORTH)

    assert compiled.kernels() is None
    assert not caplog.records


def test_a_numba_that_does_not_fit_is_said_and_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "numba.py").write_text("raise ImportError('Numba needs another NumPy')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "numba", raising=False)
    monkeypatch.setattr(compiled, "_loaded", [])

    compiled.prepare(compiled.WORTH)

    assert compiled.kernels() is None
    assert "Numba needs another NumPy" in caplog.text


def test_a_cache_that_is_broken_costs_only_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    use("compiled", monkeypatch)

    def ends(*_: Any) -> None:
        raise EOFError

    monkeypatch.setattr(compiled.kernels(), "rank", ends)
    monkeypatch.setattr(compiled, "_loaded", [])

    for _ in range(2):  # tried, and said, once
        compiled.prepare(1)

    assert compiled.kernels() is None
    assert len(caplog.records) == 1
    assert "EOFError" in caplog.text


def test_a_folder_that_can_not_be_written_costs_only_time(monkeypatch: pytest.MonkeyPatch) -> None:
    use("compiled", monkeypatch)
    loops: Any = compiled.kernels()
    numba, asked = loops.numba, []

    def nowhere(*, cache: bool = False, **options: Any) -> Any:
        asked.append(cache)
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return numba_njit(**options)

    numba_njit = numba.njit
    monkeypatch.setattr(numba, "njit", nowhere)

    double = loops.compiled(lambda number: 2 * number)

    assert (asked, double(21)) == ([True, False], 42)
