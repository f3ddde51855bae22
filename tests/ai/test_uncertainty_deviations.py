"""Deviations of several clients as columns of one covariance, against NumPy's own."""

import tracemalloc

import numpy as np
import pytest

from fl_server_ai.uncertainty import deviations
from fl_server_ai.uncertainty.deviations import Array, Client, LowRank

NAMES = {"a": 5, "b": 3}
SAMPLES = (2.0, 5.0, 1.0)


def clients(ranks: tuple[int, ...] = (4, 3, 6), sizes: dict[str, int] = NAMES) -> list[Client]:
    draw = np.random.default_rng(1)
    return [
        Client(
            samples,
            {name: draw.standard_normal(size) for name, size in sizes.items()},
            {name: draw.standard_normal((rank, size)).astype(np.float32) for name, size in sizes.items()}
            if rank
            else None,
        )
        for rank, samples in zip(ranks, SAMPLES, strict=True)
    ]  # fmt: skip


def flat(arrays: dict[str, Array]) -> Array:
    return np.concatenate([arrays[name] for name in sorted(arrays)], axis=-1)


def made(low_rank: LowRank, sizes: dict[str, int] = NAMES) -> Array:
    columns = {}
    for name, size in sizes.items():
        columns[name] = np.full((low_rank.columns, size), np.nan)
        for start, block in low_rank.blocks(name):
            columns[name][:, start : start + block.shape[1]] = block
    return flat(columns)


def covariance(columns: Array) -> Array:
    return columns.T @ columns / (len(columns) - 1)


def expected(sent: list[Client], variance: str) -> Array:
    """Law of total covariance, written down."""
    shares = np.array([client.num_examples for client in sent])
    senders = np.array([client.num_examples if client.columns else 0.0 for client in sent])
    means = np.stack([flat(dict(client.mean)) for client in sent])
    parts = [
        covariance(flat(dict(client.columns)).astype(np.float64)) if client.columns else 0.0
        for client in sent
    ]
    within = sum(w * part for w, part in zip(senders / senders.sum(), parts, strict=True))
    off = means - (shares / shares.sum()) @ means
    between = (off * (shares / shares.sum())[:, None]).T @ off
    return {"within": within, "between": between, "total": within + between}[variance]


@pytest.mark.parametrize("variance", ["total", "within", "between"])
@pytest.mark.parametrize("ranks", [(4, 3, 6), (4, 0, 2), (2, 2, 2)])
def test_few_columns_are_kept_and_have_the_mixtures_covariance(
    variance: str, ranks: tuple[int, ...]
) -> None:
    sent = clients(ranks)

    found = LowRank(sent, list(NAMES), rank=20, variance=variance)

    np.testing.assert_allclose(covariance(made(found)), expected(sent, variance), atol=1e-12)
    assert (found.columns, found.kept) == (found.given, 1.0)


@pytest.mark.parametrize("variance", ["total", "within", "between"])
def test_of_one_client_the_columns_are_its_own(variance: str) -> None:
    sent = clients()[:1]

    found = LowRank(sent, list(NAMES), rank=4, variance=variance)

    own = flat(dict(sent[0].columns or {})) * (variance != "between")
    np.testing.assert_allclose(made(found), own if own.any() else np.zeros((2, 8)), rtol=1e-12)


@pytest.mark.parametrize("block", [1, 64, deviations.BLOCK])
def test_of_many_columns_the_directions_of_largest_variance_are_kept(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = clients()
    monkeypatch.setattr(deviations, "BLOCK", block)

    found = LowRank(sent, list(NAMES), rank=3, variance="total")

    values, vectors = np.linalg.eigh(expected(sent, "total"))
    nearest = (vectors[:, -3:] * values[-3:]) @ vectors[:, -3:].T
    np.testing.assert_allclose(covariance(made(found)), nearest, atol=1e-11)
    assert found.kept == pytest.approx(values[-3:].sum() / values.sum())
    assert (found.columns, found.given) == (3, 16)


def test_the_order_of_the_clients_changes_rounding_only() -> None:
    sent = clients()

    one, two = (made(LowRank(s, list(NAMES), rank=3, variance="total")) for s in (sent, sent[::-1]))

    np.testing.assert_allclose(one, two, atol=1e-9)


def test_statistics_of_batch_norm_have_no_say_in_what_is_kept() -> None:
    sizes = {"w": 4, "n.running_var": 4}
    sent = clients(sizes=sizes)
    large = [
        Client(
            c.num_examples,
            {**c.mean, "n.running_var": c.mean["n.running_var"] * 1e6},
            c.columns,
        )
        for c in sent
    ]

    one, two = (LowRank(s, list(sizes), rank=2, variance="total") for s in (sent, large))

    first, second = (np.concatenate([b for _, b in found.blocks("w")], 1) for found in (one, two))
    np.testing.assert_allclose(first, second)


def test_memory_does_not_grow_with_the_columns() -> None:
    count, size = 12, 150_000
    rows = np.ones((count, size), np.float32)
    rows[0] = 2
    mean = np.zeros(size)
    sent = [Client(1.0, {"w": mean}, {"w": rows}) for _ in range(8)]
    tracemalloc.start()

    found = LowRank(sent, ["w"], rank=4, variance="total")
    for _ in found.blocks("w"):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert found.given * size * 8 > 120e6
    assert peak < 40e6
