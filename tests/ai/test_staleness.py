"""Stale updates: their weights, and their way from where they started, against the papers' numbers."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from fl_server_ai.aggregation import STRATEGIES, UpdateMeta
from fl_server_ai.aggregation.engine import UpdateFile, aggregate
from fl_server_core.exceptions import AggregationException
from fl_server_core.services.staleness import discount

S = [0, 1, 3, 4, 5, 8]


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("constant", {}, [1.0] * 6),
        ("polynomial", {}, [(1 + s) ** -0.5 for s in S]),
        ("polynomial", {"a": 1.0}, [1 / (1 + s) for s in S]),
        ("hinge", {}, [1, 1, 1, 1, 1 / 11, 1 / 41]),
        ("hinge", {"a": 2.0, "b": 3}, [1, 1, 1, 1 / 3, 1 / 5, 1 / 11]),
    ],
)
def test_staleness_weights_are_those_of_the_papers(kind, options, expected) -> None:
    assert [discount(kind, s, **options) for s in S] == pytest.approx(expected, abs=1e-12)


def write(path: Path, values, dtype=np.float64) -> Path:
    save_file({"w": np.asarray(values, dtype), "n": np.array([3], np.int64)}, path)
    return path


def step(tmp_path: Path, name: str, x, arrivals, dtype=np.float64, **options) -> np.ndarray:
    """One aggregation; an arrival is (model, version it started from or None, staleness)."""
    base = write(tmp_path / "base", x, dtype)
    kind = STRATEGIES[name]
    updates = [
        UpdateFile(
            write(tmp_path / f"update-{index}", model, dtype),
            UpdateMeta(f"site-{index}", 1 + index, staleness=s, discount=discount("polynomial", s)),
            start=None if start is None else write(tmp_path / f"start-{index}", start, dtype),
        )
        for index, (model, start, s) in enumerate(arrivals)
    ]
    out = tmp_path / "out"
    strategy = kind(kind.Options(**options))
    aggregate(base=base, updates=updates, out=out, strategy=strategy, device="cpu", threads=2)
    return load_file(out)["w"]


def test_fedbuff_is_algorithm_1_of_its_paper(tmp_path) -> None:
    deltas = [[1.0, 0.0], [0.0, 2.0], [-1.0, 1.0]]
    starts = [None, [5.0, -5.0], [0.25, 8.0]]
    arrivals = [
        (np.add(start or [0.0, 0.0], delta), start, s)
        for delta, start, s in zip(deltas, starts, [0, 1, 3], strict=True)
    ]

    got = step(tmp_path, "FedBuff", [0.0, 0.0], arrivals)

    assert got == pytest.approx([0.16666666666666666, 0.6380711874576984], abs=1e-9)


def test_fedbuff_can_weigh_by_samples_and_go_further(tmp_path) -> None:
    arrivals = [([2.0, 4.0], None, 0), ([6.0, 1.0], [1.0, 1.0], 3)]

    got = step(tmp_path, "FedBuff", [1.0, 2.0], arrivals, server_lr=0.5, weighting="samples")

    deltas = np.array([[1.0, 2.0], [5.0, 0.0]])
    expected = np.array([1.0, 2.0]) + 0.5 * (1 * 1.0 * deltas[0] + 2 * 0.5 * deltas[1]) / 3
    assert got == pytest.approx(expected, abs=1e-12)


def test_a_stale_gradient_is_the_gradient_that_was_sent(tmp_path) -> None:
    arrivals = [([1.0, -2.0], None, 0), ([0.5, 4.0], [7.0, -9.0], 3)]

    got = step(tmp_path, "FedSGD", [1.0, 2.0], arrivals, lr=0.5)

    weighed = np.average([[1.0, -2.0], [0.5, 4.0]], 0, [1 * 1.0, 2 * 0.5])
    assert got == pytest.approx(np.array([1.0, 2.0]) - 0.5 * weighed, abs=1e-12)


def test_fresh_fedbuff_is_fedavg_bit_for_bit(tmp_path) -> None:
    rng = np.random.default_rng(1)
    arrivals = [(rng.normal(size=1000), None, 0) for _ in range(4)]
    x = rng.normal(size=1000)

    buffered = step(tmp_path, "FedBuff", x, arrivals, np.float32, weighting="samples")
    averaged = step(tmp_path, "FedAvg", x, arrivals, np.float32)

    assert buffered.tobytes() == averaged.tobytes()


def test_fedasync_mixes_each_update_in_as_in_its_paper(tmp_path) -> None:
    x = np.array([1.0, 2.0])
    arrivals = [([2.0, 0.0], 0), ([0.0, 1.0], 2), ([3.0, 3.0], 6)]
    expected = [
        [1.6, 0.8],
        [1.0457437415779596, 0.8692820323027552],
        [1.488927403681642, 1.3524834485779436],
    ]

    for (model, staleness), after in zip(arrivals, expected, strict=True):
        x = step(tmp_path, "FedAsync", x, [(model, [9.0, 9.0], staleness)])
        assert x == pytest.approx(after, abs=1e-9)


@settings(deadline=None, max_examples=25)
@given(
    name=st.sampled_from(["FedAvg", "FedMedian", "TrimmedMean", "FedBuff"]),
    dtype=st.sampled_from([np.float32, np.float64, np.float16]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_strategy_takes_a_stale_update_as_if_it_had_started_from_the_current_model(
    tmp_path_factory, name, dtype, seed
) -> None:
    tmp_path = tmp_path_factory.mktemp("stale")
    rng = np.random.default_rng(seed)
    x, start = rng.normal(size=(2, 500)).astype(dtype).astype(np.float64)
    updates = rng.normal(size=(5, 500)).astype(dtype).astype(np.float64)
    moved = (updates[0] + (x - start)).astype(dtype)

    stale = step(tmp_path, name, x, [(updates[0], start, 2), *((u, None, 0) for u in updates[1:])],
                 dtype)  # fmt: skip
    plain = step(tmp_path, name, x, [(moved, None, 2), *((u, None, 0) for u in updates[1:])], dtype)

    assert stale.tobytes() == plain.tobytes()


def test_a_stale_update_counts_less_in_an_average(tmp_path) -> None:
    got = step(tmp_path, "FedAvg", [0.0], [([3.0], None, 0), ([2.0], [1.0], 3)])

    assert got == pytest.approx([(1 * 3.0 + 2 * 0.5 * 1.0) / (1 + 2 * 0.5)])


def test_a_stale_update_without_the_current_model_is_refused(tmp_path) -> None:
    update = UpdateFile(
        write(tmp_path / "u", [1.0]),
        UpdateMeta("a", 1, staleness=1, discount=0.5),
        start=write(tmp_path / "s", [0.0]),
    )

    with pytest.raises(AggregationException, match="base model"):
        aggregate(
            base=None, updates=[update], out=tmp_path / "out", strategy=STRATEGIES["FedAvg"]()
        )


def test_integers_of_a_stale_update_are_its_own(tmp_path) -> None:
    step(tmp_path, "FedAvg", [0.0], [([3.0], [1.0], 1)])

    assert load_file(tmp_path / "out")["n"].tolist() == [3]
