"""Means in which single numbers were left out: of those who sent a number, and nearest to the exact one."""

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import permutations
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fl_server_ai.aggregation import STRATEGIES, exact, fold
from fl_server_ai.aggregation.engine import aggregate
from tests.ai.test_aggregation import FLOAT_DTYPES, write
from tests.ai.test_aggregation_rounding import SIZES, assert_nearest

ALL_DTYPES = [*FLOAT_DTYPES, torch.float8_e4m3fn, torch.float8_e5m2]


def sparse_mean(
    folder: Path,
    rows: Sequence[torch.Tensor],
    sizes: Sequence[int],
    sent: torch.Tensor,
    order: Sequence[int] | None = None,
    discounts: Sequence[float] | None = None,
    **more: int,
) -> torch.Tensor:
    """Of updates that sent those numbers; the base's are all 5, and so are an update's that it didn't send."""
    base = torch.full(rows[0].shape, 5.0).to(rows[0].dtype)
    save_file({"w": base}, folder / "base")
    files = [{"w": torch.where(here, row, base)} for row, here in zip(rows, sent, strict=True)]
    updates = write(folder, files, sizes)
    for index, here in enumerate(sent):
        meta = replace(updates[index].meta, discount=discounts[index] if discounts else 1.0)
        updates[index] = replace(updates[index], meta=meta)
        if not here.all():
            save_file({"mask.0": here.to(torch.uint8)}, folder / f"mask-{index}")
            updates[index] = replace(updates[index], mask=folder / f"mask-{index}")
    aggregate(
        base=folder / "base",
        updates=[updates[index] for index in order or range(len(updates))],
        out=folder / "out",
        strategy=STRATEGIES["FedAvg"](),
        device="cpu",
        **more,
    )
    return load_file(folder / "out")["w"]


def random_rows(n: int, numbers: int, dtype: torch.dtype, seed: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn((n, numbers), generator=generator, dtype=torch.float64).to(dtype))


def random_masks(n: int, numbers: int) -> torch.Tensor:
    return torch.rand((n, numbers), generator=torch.Generator().manual_seed(4)) < 0.6


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [SIZES, [1] * 6, [2] * 2], ids=["by samples", "alike", "of two"])
@pytest.mark.parametrize("whole", [0, 1])
def test_means_of_those_who_sent_a_number_are_correctly_rounded(
    tmp_path: Path, dtype: torch.dtype, sizes: list[int], whole: int
) -> None:
    rows, sent = random_rows(len(sizes), 300, dtype), random_masks(len(sizes), 300)
    sent[:, :3] = torch.tensor([False, False, True])
    sent[:whole] = True

    got = sparse_mean(tmp_path, rows, sizes, sent)

    anybody = sent.any(0)
    assert (got[~anybody].double() == 5).all()
    assert anybody.all() == whole
    assert_nearest(got[anybody], [row[anybody] for row in rows], sizes, sent[:, anybody])


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_what_is_left_when_some_cancel_is_correctly_rounded(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    large = (random_rows(1, 90, torch.float64)[0].abs() + 1).to(dtype)
    small = (large.double() * torch.finfo(dtype).smallest_normal * 3).to(dtype)
    rows, sizes, sent = [large, small, -large, small], [7, 5, 7, 2**20], random_masks(4, 90)
    sent[0] = True
    sent[2, ::2] = True

    assert_nearest(sparse_mean(tmp_path, rows, sizes, sent), rows, sizes, sent)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_discounts_have_a_sum_of_their_own_for_each_number(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    rows, sent = random_rows(6, 120, dtype), random_masks(6, 120)
    rows[1] = (-rows[0].double() * 1.5).to(dtype)
    sent[0] = True
    discounts = [1 / (1 + index) ** 0.5 for index in range(6)]

    got = sparse_mean(tmp_path, rows, SIZES, sent, discounts=discounts)

    weights = [Fraction(size * by) for size, by in zip(SIZES, discounts, strict=True)]
    assert_nearest(got, rows, weights, sent)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_whatever_order_blocks_and_portions_sparse_updates_make_the_same(
    tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, sent = random_rows(3, 1_000, dtype), random_masks(3, 1_000)
    discounts = [1.0, 0.7, 0.7]
    expected = sparse_mean(tmp_path, rows, [1, 3, 3], sent, discounts=discounts)
    monkeypatch.setattr(fold, "ROOM", 16 * 3 * 70)

    for order in list(permutations(range(3)))[1::2]:
        got = sparse_mean(tmp_path, rows, [1, 3, 3], sent, order, discounts, block=333, threads=2)
        assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_a_number_that_one_sent_is_that_number_bit_for_bit(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    row, other = random_rows(2, 90, dtype)
    row[0], row[1], row[2] = -0.0, 0.0, torch.finfo(dtype).smallest_normal / 2
    row[3] = torch.finfo(dtype).max
    sent = torch.zeros((3, 90), dtype=torch.bool)
    sent[1], sent[2, 80:] = True, True
    sent[1, 80:] = False
    row[6], sent[:, 6] = 5.0, False  # the base's

    got = sparse_mean(tmp_path, [other, row, row], SIZES[:3], sent, discounts=[1, 0.3, 0.7])

    assert torch.equal(got.view(torch.uint8), row.view(torch.uint8))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("left_out", [0, 400])
def test_middles_are_many_and_none_takes_a_fraction(
    tmp_path: Path, dtype: torch.dtype, left_out: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, sent = random_rows(3, 2_000, dtype), torch.ones((3, 2_000), dtype=torch.bool)
    sent[2, : 5 * left_out] = False
    sent[0, :left_out] = False
    taken: list[object] = []
    monkeypatch.setattr(exact, "_exactly", lambda *given: taken.append(given) or Fraction(0))

    got = sparse_mean(tmp_path, rows, [2, 2, 2], sent)

    assert taken == []
    assert_nearest(got[::10].contiguous(), [row[::10] for row in rows], [2, 2, 2], sent[:, ::10])


def test_a_sparse_float64_mean_that_overflows_on_its_way_is_correctly_rounded(
    tmp_path: Path,
) -> None:
    rows = [
        torch.tensor(row, dtype=torch.float64)
        for row in ([1e305, 1e305, 1.7e308, 1.0], [-1e305, -1e305, 1.7e308, 3.0], [1.1 * 2.0**-1000] * 4)
    ]  # fmt: skip
    sizes, sent = [2**20, 2**20, 2**21], torch.ones((3, 4), dtype=torch.bool)
    sent[2, 1:3] = sent[1, 0] = False

    assert_nearest(sparse_mean(tmp_path, rows, sizes, sent), rows, sizes, sent)
