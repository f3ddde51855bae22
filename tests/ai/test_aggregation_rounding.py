"""A mean is the number of its dtype that is nearest to the exact one, whatever is averaged."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from safetensors.torch import load_file

from fl_server_ai.aggregation import STRATEGIES, fold
from fl_server_ai.aggregation.engine import aggregate
from fl_server_ai.aggregation.exact import in_small_numbers
from tests.ai.loops import loops
from tests.ai.test_aggregation import FLOAT_DTYPES, average, exact_mean, write

__all__ = ["loops"]
pytestmark = pytest.mark.usefixtures("loops")
BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
SIZES = [60_000, 1, 77, 2**20 - 1, 3, 999_983]


def assert_nearest(
    got: torch.Tensor,
    rows: Sequence[torch.Tensor],
    sizes: Sequence[int | Fraction],
    sent: torch.Tensor | None = None,
) -> None:
    """Neither neighbour is nearer, and in the middle the number is the even one; (updates, numbers) bool `sent`."""
    bits = got.view(BITS[got.element_size()])
    around = [(bits + step).view(got.dtype).double().tolist() for step in (0, -1, 1)]
    columns = torch.stack([row.double() for row in rows]).T.tolist()
    shares = [sizes] * len(columns) if sent is None else shares_of(sizes, sent)
    for column, by, last, mean, *neighbours in zip(
        columns, shares, bits.tolist(), *around, strict=True
    ):
        nearest = exact_mean(column, by)
        if mean == 0:
            kind = torch.finfo(got.dtype)
            assert abs(nearest) <= Fraction(kind.smallest_normal) * Fraction(kind.eps) / 2
            continue
        off = abs(Fraction(mean) - nearest)
        for other in neighbours:
            distance = abs(Fraction(other) - nearest)
            assert off < distance or (off == distance and last % 2 == 0), (column, mean, other)


def shares_of(
    sizes: Sequence[int | Fraction], sent: torch.Tensor
) -> Iterator[list[int | Fraction]]:
    for column in sent.T.tolist():
        yield [size if here else 0 for size, here in zip(sizes, column, strict=True)]


def mean(folder: Path, rows: Sequence[torch.Tensor], sizes: Sequence[int]) -> torch.Tensor:
    return average(folder, [{"w": row} for row in rows], sizes)["w"]


@settings(max_examples=40)
@given(
    rows=some.lists(
        some.lists(some.floats(-(2.0**60), 2.0**60, width=32), min_size=5, max_size=5),
        min_size=2,
        max_size=6,
    ),
    data=some.data(),
)
def test_any_float32_mean_is_correctly_rounded(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[float]], data: some.DataObject
) -> None:
    sizes = [data.draw(some.integers(1, 2**20)) for _ in rows]
    tensors = [torch.tensor(row, dtype=torch.float32) for row in rows]

    assert_nearest(mean(tmp_path_factory.mktemp("mean"), tensors, sizes), tensors, sizes)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [SIZES, [1] * 6, [2] * 2], ids=["by samples", "alike", "of two"])
def test_no_neighbour_is_nearer_to_the_exact_mean(
    tmp_path: Path, dtype: torch.dtype, sizes: list[int]
) -> None:
    generator = torch.Generator().manual_seed(9)
    rows = [torch.randn(400, generator=generator, dtype=torch.float64).to(dtype) for _ in sizes]

    assert_nearest(mean(tmp_path, rows, sizes), rows, sizes)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_what_is_left_when_terms_cancel_is_correctly_rounded(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(5)
    large = (torch.rand(60, generator=generator, dtype=torch.float64) + 1).to(dtype)
    small = (large.double() * torch.finfo(dtype).smallest_normal * 3).to(dtype)
    rows = [large, small, -large]

    got = mean(tmp_path, rows, [7, 5, 7])

    assert (got != 0).all()
    assert_nearest(got, rows, [7, 5, 7])


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many numbers were looked at again, each time."""
    found: list[int] = []
    columns = fold.Folder._columns

    def watched(*args: object) -> torch.Tensor:
        found.append(args[-1].numel())  # type: ignore[attr-defined]
        return columns(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(fold.Folder, "_columns", watched)
    return found


def test_the_few_in_doubt_among_many_are_right_too(tmp_path: Path, settled: list[int]) -> None:
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randn(30_000, generator=generator) for _ in SIZES]
    rows[1][::10_000], rows[2][::10_000] = 1e25, -1e25 / 77

    got = mean(tmp_path, rows, SIZES)

    assert settled == [3]  # of 30,000
    chosen = slice(None, None, 10_000)
    assert_nearest(got[chosen].contiguous(), [row[chosen] for row in rows], SIZES)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_discounted_updates_are_weighed_exactly_too(tmp_path: Path, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(6)
    rows = [torch.randn(200, generator=generator, dtype=torch.float64).to(dtype) for _ in SIZES]
    for row in rows:
        row[:100] = 0  # too many to be settled one by one
    rows[1][100:110], rows[2][100:110] = 1e4, -1e4
    updates = [
        replace(update, meta=replace(update.meta, discount=1 / (1 + index) ** 0.5))
        for index, update in enumerate(write(tmp_path, [{"w": row} for row in rows], SIZES))
    ]
    weights = [Fraction(update.meta.num_examples * update.meta.discount) for update in updates]

    aggregate(
        base=None, updates=updates, out=tmp_path / "out", strategy=STRATEGIES["FedAvg"](), device="cpu"
    )  # fmt: skip

    assert_nearest(load_file(tmp_path / "out")["w"], rows, weights)


def test_a_float64_mean_that_overflows_on_its_way_keeps_its_small_numbers(tmp_path: Path) -> None:
    rows = [
        torch.tensor(row, dtype=torch.float64)
        for row in (
            [1e305, 1e305],
            [-1e305, -1e305],
            [1.1 * 2.0**-1000, 2.0**-965 * (1 + 2.0**-52)],
        )
    ]

    assert_nearest(mean(tmp_path, rows, [2**20, 2**20, 2**21]), rows, [2**20, 2**20, 2**21])


def test_what_is_zero_everywhere_needs_no_second_look(tmp_path: Path, settled: list[int]) -> None:
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randn(60_000, generator=generator) for _ in SIZES]
    for row in rows:
        row[:50_000] = 0

    got = mean(tmp_path, rows, SIZES)

    assert sum(settled) < 100
    assert not got[:50_000].any()


def test_numbers_in_doubt_are_settled_in_portions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fold, "ROOM", 16 * 6 * 70)
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randn(1_000, generator=generator) for _ in SIZES]
    rows[3] *= 1e20  # its square is too large for a float32

    assert_nearest(mean(tmp_path, rows, SIZES), rows, SIZES)


def test_numbers_that_the_float64_sum_gets_wrong_come_out_right(tmp_path: Path) -> None:
    rows = [torch.tensor([one]) for one in (1.0, 1e-12, -1.0)]
    in_float64 = torch.stack(rows).double().cumsum(0)[-1] / 3

    got = mean(tmp_path, rows, [1, 1, 1])

    assert got != in_float64.float()
    assert_nearest(got, rows, [1, 1, 1])


@pytest.mark.parametrize(
    ("weights", "small"),
    [
        ([1 / 40] * 3, [1, 1, 1]),
        ([600.0, 60_000.0], [1, 100]),
        ([0.5, 1.5, 2.0**-20], [2**19, 3 * 2**19, 1]),
        ([0.1, 0.2], [1, 2]),
        ([0.1, 0.3], [0.1, 0.3]),  # not thrice as much, to the last bit
    ],
)
def test_shares_are_taken_in_small_numbers(weights: list[float], small: list[float]) -> None:
    assert in_small_numbers(weights) == small


def test_a_float64_mean_that_hardly_misses_the_middle_goes_to_its_side(tmp_path: Path) -> None:
    last = torch.arange(-40, 40, dtype=torch.float64)
    rows = [1 + (2 * last + 1) * 2.0**-51, 3 + 0 * last, 2.0**-130 * (last % 3 - 1)]

    got = mean(tmp_path, rows, [1, 1, 2])

    assert_nearest(got, rows, [1, 1, 2])
