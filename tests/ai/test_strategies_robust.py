"""Robust rules against NumPy, the project's published vectors, and the attacks they are for."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fl_server_ai.aggregation import order
from fl_server_ai.aggregation.distances import FEW
from fl_server_ai.aggregation.order import mean_of, ranked
from fl_server_core.exceptions import AggregationException
from tests.ai.loops import loops
from tests.ai.strategy_files import Array, Lab, cloud

__all__ = ["loops"]
pytestmark = pytest.mark.usefixtures("loops")

# Copied from the project's shared test vectors: inputs, sample sizes, options, result, tolerance.
FIVE = [[1.0, 10.0], [2.0, -3.0], [4.0, 0.0], [100.0, 1.0], [-50.0, 2.5]]
SEVEN = [[1.0, 2.0], [1.1, 2.02], [0.97, 2.1], [0.9, 2.05], [1.06, 1.9], [6.0, 7.0], [-5.0, 6.0]]
NEAR = [[1.0, 1.0], [1.1, 0.9], [0.9, 1.2], [1.05, 1.0], [0.95, 0.95], [1.2, 1.1], [9.0, -9.0]]
POINTS = [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [10.0, 10.0]]
RFA = {"nu": 1e-6, "iters": 500, "tolerance": 0}
VECTORS: dict[str, tuple[str, Any, Any, dict[str, Any], list[float], float]] = {
    "median_odd": ("FedMedian", FIVE, (), {}, [2.0, 1.0], 1e-9),
    "trimmed_mean_beta0.2": ("TrimmedMean", FIVE, (), {"beta": 0.2}, [7 / 3, 7 / 6], 1e-9),
    "krum": ("Krum", SEVEN, (), {"f": 2}, [1.0, 2.0], 1e-9),
    "multikrum_weighted": (
        "MultiKrum", SEVEN, range(10, 80, 10), {"f": 2, "m": 3, "weighting": "samples"},
        [1.0183333333333333, 2.0566666666666666], 1e-9,
    ),
    "bulyan_oneshot": (
        "Bulyan", NEAR, (), {"f": 1, "selection": "oneshot"}, [1.05, 0.9833333333333334], 1e-9,
    ),
    "geometric_median_converged": ("GeometricMedian", POINTS, [1, 2, 2, 1], RFA, [0.5, 0.5], 1e-5),
    "norm_clipping_mean": (
        "NormClipping", [[4.0, 5.0], [1.3, 1.4], [1.0, 1.0]], (), {"C": 1}, [1.3, 1.4], 1e-9,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", VECTORS)
def test_the_published_vectors_come_out(tmp_path: Path, name: str) -> None:
    strategy, models, sizes, options, expected, atol = VECTORS[name]

    got = Lab(tmp_path, strategy, **options).step([1.0, 1.0], models, sizes)

    np.testing.assert_allclose(got, expected, rtol=0, atol=atol)


def trimmed(rows: Array) -> Array:
    cut = len(rows) // 4
    return np.sort(rows, axis=0)[cut : len(rows) - cut].mean(axis=0)


def krum_scores(rows: Array, f: int) -> Array:
    squares = ((rows[:, None] - rows[None]) ** 2).sum(axis=2)
    return np.array(
        [np.sort(np.delete(line, k))[: len(rows) - f - 2].sum() for k, line in enumerate(squares)]
    )


def krum(rows: Array) -> Array:
    return rows[krum_scores(rows, 2).argmin()]


def multi_krum(rows: Array) -> Array:
    return rows[np.argsort(krum_scores(rows, 2), kind="stable")[: len(rows) - 2]].mean(axis=0)


def bulyan(rows: Array) -> Array:
    left, chosen = list(range(len(rows))), []
    while len(chosen) < len(rows) - 4:
        near = max(1, len(left) - 4)
        squares = ((rows[left][:, None] - rows[left][None]) ** 2).sum(axis=2)
        scores = [np.sort(np.delete(line, k))[:near].sum() for k, line in enumerate(squares)]
        chosen.append(left.pop(int(np.argmin(scores))))
    column = np.sort(rows[chosen], axis=0)
    away = np.abs(column - np.median(column, axis=0))
    nearest = np.argsort(away, axis=0, kind="stable")[: len(chosen) - 4]
    return np.take_along_axis(column, nearest, axis=0).mean(axis=0)


def weiszfeld(rows: Array) -> Array:
    v = rows.mean(axis=0)
    for _ in range(20):
        b = 1 / np.maximum(1e-6, np.linalg.norm(rows - v, axis=1))
        v = (b[:, None] * rows).sum(axis=0) / b.sum()
    return v


def clipped(rows: Array) -> Array:
    length = np.linalg.norm(rows, axis=1)
    return (rows * np.minimum(1, 2 / length)[:, None]).mean(axis=0)


def centered(rows: Array, v: Any = 0.0) -> Array:
    for _ in range(4):
        away = np.linalg.norm(rows - v, axis=1)
        v = v + ((rows - v) * np.minimum(1, 3 / away)[:, None]).mean(axis=0)
    return v


REFERENCES: dict[str, tuple[Any, dict[str, Any]]] = {
    "FedMedian": (lambda rows: np.median(rows, axis=0), {}),
    "TrimmedMean": (trimmed, {"beta": 0.25}),
    "Krum": (krum, {"f": 2}),
    "MultiKrum": (multi_krum, {"f": 2}),
    "Bulyan": (bulyan, {"f": 2}),
    "GeometricMedian": (weiszfeld, {"iters": 20, "tolerance": 0, "weighting": "uniform"}),
    "NormClipping": (clipped, {"C": 2}),
    "CenteredClipping": (centered, {"tau": 3, "iters": 4}),
}


@pytest.mark.parametrize("n", [11, 14, 40])
@pytest.mark.parametrize("name", REFERENCES)
def test_a_robust_rule_follows_its_formula(tmp_path: Path, name: str, n: int) -> None:
    reference, options = REFERENCES[name]
    rows = cloud(n)
    rows[3] *= -20

    got = Lab(tmp_path, name, **options).step(np.zeros(60), list(rows), block=7)

    # The geometric median divides by distances, which come out of differences of squares.
    rtol = 1e-7 if name == "GeometricMedian" else 1e-9
    np.testing.assert_allclose(got, reference(rows), rtol=rtol, atol=1e-12)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float64, 60), (torch.float32, 600_000)])
def test_centered_clipping_goes_on_from_its_last_aggregate(
    tmp_path: Path, dtype: Any, size: int
) -> None:
    lab = Lab(tmp_path, "CenteredClipping", tau=3, iters=4)
    x: Any = np.zeros(size)
    v: Any = 0.0

    for number in range(3):
        ways = cloud(4, size, seed=number)
        ways[3] *= -20
        rows = torch.tensor(x + ways, dtype=dtype)
        base = torch.tensor(x, dtype=dtype)
        v = centered((rows.double() - base.double()).numpy(), v)
        expected = base.double().numpy() + v
        x = lab.step(base, list(rows), block=max(7, size // 9))

        close = 1e-9 if dtype == torch.float64 else 1e-5
        np.testing.assert_allclose(x, expected, rtol=close, atol=close)


@pytest.mark.parametrize("evil", [-1000.0, 1e30, 1e300], ids=str)
@pytest.mark.parametrize("name", REFERENCES)
def test_two_of_eleven_cannot_carry_the_model_away(tmp_path: Path, name: str, evil: float) -> None:
    rows = cloud(11)
    rows[[0, 7]] = evil

    options = {"start": "medoid"} if name == "GeometricMedian" else {}

    got = Lab(tmp_path, name, **options).step(np.zeros(60), list(rows))

    honest = np.delete(rows, [0, 7], axis=0).mean(axis=0)
    limit = {"NormClipping": 0.6, "CenteredClipping": 0.6, "GeometricMedian": 0.3}
    assert np.linalg.norm(got - honest) <= limit.get(name, 0.2) * np.linalg.norm(honest)


SMALL = [("Krum", {"f": 2}, 7), ("MultiKrum", {"f": 1}, 5), ("MultiKrum", {"m": 6}, 6),
         ("Bulyan", {"f": 1}, 7), ("Krum", {}, 3), ("Bulyan", {}, 3)]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "enough"), SMALL, ids=str)
def test_too_few_updates_are_refused_with_the_numbers(
    tmp_path: Path, name: str, options: dict[str, int], enough: int
) -> None:
    lab = Lab(tmp_path, name, **options)

    lab.step(np.zeros(60), list(cloud(enough)))
    with pytest.raises(AggregationException) as refusal:
        lab.step(np.zeros(60), list(cloud(enough - 1)))

    said = str(refusal.value)
    assert f"at least {enough} updates" in said
    assert f"there are {enough - 1}" in said
    assert "n >= " in said


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("name", sorted(REFERENCES.keys() - {"Krum", "MultiKrum", "Bulyan"}))
def test_a_handful_of_updates_is_enough_for_the_others(tmp_path: Path, name: str, n: int) -> None:
    rows = cloud(n)

    got = Lab(tmp_path, name).step(np.ones(60), list(rows))

    assert np.abs(got - 1).max() <= np.abs(rows - 1).max()


@pytest.mark.parametrize("beta", [0.29, 0.49])
def test_the_share_that_is_cut_is_rounded_down_as_on_paper(tmp_path: Path, beta: float) -> None:
    rows = np.random.default_rng(1).permutation(np.arange(100.0) ** 3)[:, None]

    got = Lab(tmp_path, "TrimmedMean", beta=beta).step([0.0], list(rows))

    cut = round(100 * beta)
    assert got[0] == pytest.approx((np.arange(cut, 100 - cut) ** 3.0).mean(), rel=1e-14)


@pytest.mark.parametrize("name", ["FedMedian", "TrimmedMean"])
def test_the_largest_numbers_do_not_overflow(tmp_path: Path, name: str) -> None:
    largest = np.finfo(np.float64).max
    rows = np.array([[largest, largest, largest], [largest, -largest, largest / 2]] * 2)

    got = Lab(tmp_path, name, **({"beta": 0.25} if name == "TrimmedMean" else {})).step(
        np.zeros(3), list(rows)
    )

    np.testing.assert_allclose(got, [largest, 0, largest * 0.75])


FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", ["FedMedian", "TrimmedMean", "Krum", "MultiKrum", "Bulyan"])
def test_updates_that_are_alike_give_back_their_own_bytes(
    tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(4)
    model = torch.randn(500, generator=generator, dtype=torch.float64).to(dtype)
    model[:3] = torch.tensor(
        [0.0, -0.0, min(1e100, torch.finfo(dtype).max)], dtype=torch.float64
    ).to(dtype)

    Lab(tmp_path, name).step(torch.zeros(500).to(dtype), [model] * 11, [5] * 10 + [2**31])

    assert (tmp_path / "out-1").read_bytes() == (tmp_path / "1-000").read_bytes()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("n", [*range(1, 20), 31, 64, 65])
def test_ranks_are_those_of_a_full_sort_bit_for_bit(n: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(n)
    rows = (torch.randn(n, 200, generator=generator) * 3).round().to(dtype)  # many are equal
    rows[0, :50] = torch.tensor(-0.0).to(dtype)
    whole = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[dtype.itemsize]
    keys = rows.view(whole).to(torch.int64)
    keys = torch.where(keys < 0, torch.iinfo(whole).min - keys - 1, keys)
    places = keys.sort(dim=0).indices
    expected = rows.view(whole).gather(0, places).view(dtype)

    for first, last in [(0, n), ((n - 1) // 2, n // 2 + 1), (n // 3, n - n // 3)]:
        got = ranked(rows, first, last)

        assert torch.equal(got.view(whole), expected[first:last].view(whole))


ODD = [0.0, -0.0, 1.0, -1.0, math.nan, -math.nan, math.inf, -math.inf, 2.0**-1074, 2.0**-149]


@pytest.mark.parametrize("dtype", FLOATS[:4], ids=str)
@pytest.mark.parametrize("n", [2, 7, 32, 33])
def test_ranks_keep_the_bits_of_numbers_that_do_not_compare(n: int, dtype: torch.dtype) -> None:
    generator = np.random.default_rng(n)
    rows = torch.from_numpy(generator.choice(ODD, size=(n, 300))).to(dtype)
    rows[:, 200:] = torch.from_numpy(generator.choice(ODD[:4], size=(n, 100))).to(dtype)
    whole = {8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize]
    keys = rows.view(whole).to(torch.int64)
    keys = torch.where(keys < 0, torch.iinfo(whole).min - keys - 1, keys)
    expected = rows.view(whole).gather(0, keys.sort(dim=0).indices)

    got = ranked(rows, n // 3, n)

    assert torch.equal(got.view(whole), expected[n // 3 :])


@pytest.mark.parametrize("dtype", FLOATS[:4], ids=str)
def test_the_mean_of_ranks_is_the_same_in_blocks_of_any_width(dtype: torch.dtype) -> None:
    values = torch.randn(40, 20_000, generator=torch.Generator().manual_seed(2)).to(dtype)
    values = values.double().sort(dim=0).values.to(dtype)
    values[:, 7], values[:, 8] = -0.0, torch.finfo(dtype).max
    expected = values[0].double().clone()
    for row in values[1:]:
        expected += row.double()
    expected = (expected / 40).where(values[0] != values[-1], values[0].double())

    parts = [slice(0, 1), slice(1, 3), slice(3, 300), slice(300, 20_000)]
    got = torch.cat([mean_of(values[:, part]) for part in parts])

    assert torch.equal(got.view(torch.int64), expected.view(torch.int64))
    assert torch.equal(mean_of(values).view(torch.int64), expected.view(torch.int64))


@pytest.mark.parametrize("n", [5, 50])
def test_network_and_sort_make_the_same_bytes(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    rows = torch.randn(n, 20_000, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    made = []

    for limit in (0, 100):
        monkeypatch.setattr(order, "NETWORK", limit)
        made.append(ranked(rows, n // 4, n - n // 4).view(torch.int32))

    assert torch.equal(*made)


# A step that all make together, what sets them apart, and how far the worst is off.
APART = [(0.0, 1.0), (1.0, 1e-3), (1e3, 0.1), (0.0, 1e-25), (0.0, 1e25)]


@pytest.mark.parametrize(("shared", "apart"), APART, ids=str)
@pytest.mark.parametrize("n", [9, FEW + 1])
def test_krum_of_float32_finds_the_one_that_exact_distances_find(
    tmp_path: Path, n: int, shared: float, apart: float
) -> None:
    generator = np.random.default_rng(n)
    steps = generator.standard_normal((n, 3_000))
    steps *= np.linspace(1.0, 1.02, n)[generator.permutation(n), None]
    rows = (shared + apart * steps).astype(np.float32)
    expected = krum_scores(rows.astype(np.float64), 2).argmin()

    got = Lab(tmp_path, "Krum", f=2).step(
        torch.full((3_000,), shared), [torch.from_numpy(row) for row in rows]
    )

    np.testing.assert_array_equal(got, rows[expected])


def test_krum_of_float32_is_the_same_for_any_number_of_threads(tmp_path: Path) -> None:
    rows = [torch.randn(300_000, generator=torch.Generator().manual_seed(k)) for k in range(5)]
    rows[3] *= 1e25

    made = [
        Lab(tmp_path, "MultiKrum", f=1).step(torch.zeros(300_000), rows, threads=threads)
        for threads in (1, 3)
    ]

    np.testing.assert_array_equal(*made)


def test_krum_takes_the_first_of_equally_good_ones(tmp_path: Path) -> None:
    rows = np.array([[5.0], [0.0], [1.0], [2.0], [9.0]])  # with f = 1 two neighbours count

    got = Lab(tmp_path, "Krum", f=1).step([0.0], list(rows))

    assert got.tolist() == [1.0]


def test_both_starts_of_the_geometric_median_end_at_the_same_point(tmp_path: Path) -> None:
    rows = cloud(9)
    rows[4] = 30

    ends = [
        Lab(tmp_path, "GeometricMedian", start=start, iters=500, tolerance=0).step([0.0] * 60, rows)
        for start in ("mean", "medoid")
    ]

    np.testing.assert_allclose(ends[0], ends[1], rtol=1e-7)


def test_updates_too_large_to_compare_are_never_chosen(tmp_path: Path) -> None:
    rows = cloud(7)
    rows[:6] = 1e200

    with pytest.raises(AggregationException, match="small enough"):
        Lab(tmp_path, "Krum").step(np.zeros(60), list(rows))


def test_clipping_to_the_median_leaves_the_shorter_half_as_it_is(tmp_path: Path) -> None:
    rows = np.diag([1.0, 2.0, 3.0, 4.0, 1e6])

    got = Lab(tmp_path, "NormClipping").step(np.zeros(5), list(rows))

    np.testing.assert_allclose(got, [0.2, 0.4, 0.6, 0.6, 0.6])


def test_a_claimed_sample_size_buys_nothing(tmp_path: Path) -> None:
    rows = cloud(9)
    rows[8] = 50
    sizes = [1] * 8 + [2**31]

    for name in sorted(REFERENCES.keys() - {"GeometricMedian"}):
        folder = tmp_path / name
        folder.mkdir()
        got = Lab(folder, name).step(np.zeros(60), list(rows), sizes)
        assert math.dist(got, [1.0] * 60) < 0.4 * math.sqrt(60), name
