"""Server optimizers against NumPy and the project's published vectors, through files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fl_server_ai.aggregation import STRATEGIES
from fl_server_ai.aggregation.options import parse_options
from fl_server_core.exceptions import AggregationException, Invalid
from tests.ai.strategy_files import Array, Lab

# Copied from the project's shared test vectors.
START = [1.0, -2.0, 0.5]
DELTAS = [[0.2, -0.1, 0.4], [0.1, 0.3, -0.2], [-0.3, 0.05, 0.1]]
VECTORS: dict[str, tuple[str, dict[str, Any], list[list[float]]]] = {
    "fedavgm_lr1.0_beta0.9": (
        "FedAvgM",
        {"server_lr": 1.0, "momentum": 0.9},
        [[1.2, -2.1, 0.9], [1.48, -1.89, 1.06], [1.432, -1.651, 1.304]],
    ),
    "fedadagrad_paper": (
        "FedAdagrad",
        {"eta": 0.1, "beta_1": 0.0, "tau": 0.001},
        [
            [1.0995012499921877, -2.099004999875006, 0.5997503124995117],
            [1.144023056753543, -2.004436195729492, 0.5551288411462568],
            [1.0640586835432821, -1.988867523846299, 0.5769030630788157],
        ],
    ),
    "fedadagrad_flwr": (
        "FedAdagrad",
        {"variant": "flwr"},
        [
            [1.099502487562189, -2.099009900990099, 0.5997506234413965],
            [1.1440247375571848, -2.004440625492293, 0.5551290407834875],
            [1.0640600795216144, -1.9888718779010168, 0.5769033144464851],
        ],
    ),
    "fedadam_paper": (
        "FedAdam",
        {"eta": 0.1, "beta_1": 0.9, "beta_2": 0.99, "tau": 0.001},
        [
            [1.0951260516755887, -2.090502831185222, 0.5975315422879747],
            [1.2153335788779895, -2.0261300072397486, 0.6326553748236029],
            [1.2028041000923475, -1.9533944465933748, 0.6851920967437096],
        ],
    ),
    "fedadam_flwr": (
        "FedAdam",
        {"variant": "flwr"},
        [
            [1.0707104560384255, -2.067496344400315, 0.5724351013076554],
            [1.1472274954505797, -2.0265396203273736, 0.5947771520066534],
            [1.1399928310280498, -1.9845360622841026, 0.6251091311117831],
        ],
    ),
    "fedyogi_paper": (
        "FedYogi",
        {"eta": 0.01, "beta_1": 0.9, "beta_2": 0.99, "tau": 0.001},
        [
            [1.0095124921972505, -2.009049875621121, 0.5097531245118713],
            [1.0214869885971862, -2.0026157729729075, 0.5132517275912865],
            [1.0202379622699487, -1.9953801972590475, 0.5184613212279975],
        ],
    ),
}


@pytest.mark.parametrize("name", VECTORS)
def test_the_published_vectors_come_out_round_after_round(tmp_path: Path, name: str) -> None:
    strategy, options, expected = VECTORS[name]
    lab, x = Lab(tmp_path, strategy, **options), np.array(START)

    for delta, wanted in zip(DELTAS, expected, strict=True):
        # Two clients whose weighted mean is the delta.
        x = lab.step(x, [x + np.array(delta) * 4, x], [1, 3])

        np.testing.assert_allclose(x, wanted, rtol=0, atol=1e-9)


def avg_m(x: Array, d: Array, m: Array, v: Array, t: int) -> tuple[Array, Array, Array]:
    m = 0.7 * m - d
    return x - 0.5 * m, m, v


def adagrad(x: Array, d: Array, m: Array, v: Array, t: int) -> tuple[Array, Array, Array]:
    m, v = 0.3 * m + 0.7 * d, v + d**2
    return x + 0.2 * m / (np.sqrt(v) + 0.01), m, v


def adam(x: Array, d: Array, m: Array, v: Array, t: int) -> tuple[Array, Array, Array]:
    m, v = 0.8 * m + 0.2 * d, 0.95 * v + 0.05 * d**2
    return x + 0.2 * m / (np.sqrt(v) + 0.01), m, v


def yogi(x: Array, d: Array, m: Array, v: Array, t: int) -> tuple[Array, Array, Array]:
    m, v = 0.8 * m + 0.2 * d, v - 0.05 * d**2 * np.sign(v - d**2)
    return x + 0.2 * m / (np.sqrt(v) + 0.01), m, v


REFERENCES: dict[str, tuple[Callable[..., Any], dict[str, float]]] = {
    "FedAvgM": (avg_m, {"server_lr": 0.5, "momentum": 0.7}),
    "FedAdagrad": (adagrad, {"eta": 0.2, "beta_1": 0.3, "tau": 0.01}),
    "FedAdam": (adam, {"eta": 0.2, "beta_1": 0.8, "beta_2": 0.95, "tau": 0.01}),
    "FedYogi": (yogi, {"eta": 0.2, "beta_1": 0.8, "beta_2": 0.95, "tau": 0.01}),
}


WAYS = [
    *((name, {"weighting": how}) for name in REFERENCES for how in ("samples", "uniform")),
    *((name, {"variant": "zero"}) for name in ("FedAdagrad", "FedAdam", "FedYogi")),
]


@pytest.mark.parametrize(("name", "more"), WAYS, ids=str)
def test_a_server_optimizer_follows_its_formula(
    tmp_path: Path, name: str, more: dict[str, str]
) -> None:
    reference, options = REFERENCES[name]
    generator = np.random.default_rng(11)
    lab = Lab(tmp_path, name, **options, **more)
    x = expected = generator.standard_normal(300)
    m, v = np.zeros(300), np.full(300, 0.0 if "variant" in more else 0.01**2)

    for t in range(1, 5):
        updates, sizes = x + generator.standard_normal((5, 300)), [3, 1, 4, 1, 5]
        mean = np.average(updates, 0, None if more.get("weighting") == "uniform" else sizes)
        expected, m, v = reference(x, mean - x, m, v, t)
        x = lab.step(x, list(updates), sizes, block=37)

        np.testing.assert_allclose(x, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", REFERENCES)
def test_the_state_makes_the_same_bytes_in_any_blocks_and_threads(
    tmp_path: Path, name: str
) -> None:
    made = set()
    for index, (block, threads) in enumerate([(1, 1), (33, 2), (131_072, 1)]):
        folder = tmp_path / str(index)
        folder.mkdir()
        lab = Lab(folder, name)
        for round in range(3):
            updates = torch.randn(4, 97, generator=torch.Generator().manual_seed(round))
            lab.step(torch.zeros(97), list(updates), [1, 2, 3, 4], block=block, threads=threads)
        assert lab.state is not None
        made.add(((folder / "out-3").read_bytes(), lab.state.read_bytes()))

    assert len(made) == 1


@pytest.mark.parametrize("name", REFERENCES)
def test_a_coordinate_that_nobody_moved_keeps_its_sign(tmp_path: Path, name: str) -> None:
    zeros = torch.tensor([0.0, -0.0])

    Lab(tmp_path, name).step(zeros, [zeros] * 3)

    assert (tmp_path / "out-1").read_bytes() == (tmp_path / "base-1").read_bytes()


def slid(tau: int, rho: float, slope: float) -> float:
    """How far SGD with momentum, as torch has it, goes in tau steps of lr 1 down a slope."""
    way = speed = 0.0
    for _ in range(tau):
        speed = rho * speed + slope
        way += speed
    return way


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_fednova_takes_momentum_out_of_the_steps(tmp_path: Path, rho: float) -> None:
    taus, slopes, sizes = [1, 4, 9], [1.0, -0.5, 0.25], [2, 3, 5]
    x, p = np.array([0.3]), np.array(sizes) / 10
    updates = [x - slid(tau, rho, slope) for tau, slope in zip(taus, slopes, strict=True)]

    got = Lab(tmp_path, "FedNova", momentum=rho, gamma=0.7).step(x, updates, sizes, taus)

    # Each went |a_k| times its slope; normalised, it is the slope that is left of it.
    lengths = [slid(tau, rho, 1.0) for tau in taus]
    assert got == pytest.approx(x - 0.7 * (p @ lengths) * (p @ slopes), abs=1e-12)


@pytest.mark.parametrize("name", ["FedAdagrad", "FedAdam", "FedYogi"])
def test_a_state_that_overflows_fails_the_round_and_is_not_stored(
    tmp_path: Path, name: str
) -> None:
    lab = Lab(tmp_path, name)
    lab.step(torch.zeros(3), [torch.ones(3)])
    far = torch.tensor([1.0, 3e22, 1.0])  # the new model is finite, the square of the way is not

    with pytest.raises(AggregationException, match=r"'v'.*infinity in tensor 'w'"):
        lab.step(torch.zeros(3), [far])

    assert not (tmp_path / "out-2").exists()
    assert not (tmp_path / "state-2").exists()


BAD = [
    ("FedAvgM", {"momentum": 1.0}), ("FedAvgM", {"server_lr": 0}), ("FedAdam", {"beta_2": 1}),
    ("FedAdam", {"eta": -1}), ("FedYogi", {"tau": 0}), ("FedAdagrad", {"variant": "tensorflow"}),
    ("FedAdagrad", {"beta_2": 0.9}), ("TrimmedMean", {"beta": 0.5}), ("Krum", {"f": -1}),
    ("Krum", {"f": 1.5}), ("MultiKrum", {"m": 0}), ("Bulyan", {"selection": "twice"}),
    ("GeometricMedian", {"nu": 0}), ("NormClipping", {"C": 0}), ("CenteredClipping", {"iters": 0}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options"), BAD, ids=str)
def test_options_out_of_range_are_refused(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(Invalid) as refusal:
        parse_options(STRATEGIES[name].Options, options)

    assert [fault["pointer"] for fault in refusal.value.data["errors"]] == [
        f"/options/{key}" for key in options
    ]
