"""The recipes behind `make papers`, and P1's first rounds against a real server; `heavy`: all of it."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.papers import __main__ as command
from benchmarks.papers import data, heart, report, robust, two_nn
from benchmarks.papers.federation import Federation

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def patients() -> data.Heart:
    if why := data.missing(data.FOLDER, data.HEART):
        pytest.skip(why)
    return data.heart(data.FOLDER)


def alone(patients: data.Heart, seed: int, rounds: int) -> Iterator[dict[str, Tensor]]:
    """FedAvg without a server: sums in float64, one division, one rounding to float32."""
    module, hospitals = heart.seeded(patients, seed)
    weights = {name: value.numpy() for name, value in module.state_dict().items()}
    for _ in range(rounds):
        answers = [h.fit(weights, {}, None) for h in hospitals]  # type: ignore[arg-type]
        total = sum(answer.num_examples for answer in answers)
        weights = {
            name: (
                sum(a.num_examples * a.weights[name].astype(np.float64) for a in answers) / total
            ).astype(np.float32)
            for name in weights
        }
        yield {name: torch.from_numpy(value) for name, value in weights.items()}


@pytest.mark.parametrize(
    ("accuracies", "expected"),
    [
        ([90.0, 98.0], 1.875),
        ([96.0, 95.0, 98.0], 2.5),  # the best so far counts, not the round before
        ([90.0, 97.0, 96.0], 2.0),
        ([97.5], 1.0),
        ([90.0, 96.9], None),
        ([], None),
    ],
)
def test_the_crossing_lies_on_a_straight_line_between_the_best_so_far(
    accuracies: list[float], expected: float | None
) -> None:
    assert two_nn.crossing(accuracies) == pytest.approx(expected)


@pytest.mark.parametrize("iid", [True, False])
def test_every_image_is_dealt_to_one_client(iid: bool) -> None:
    labels = np.random.default_rng(0).integers(10, size=60_000)

    shares = two_nn.dealt(labels, 42, iid=iid)

    assert [len(share) for share in shares] == [600] * 100
    assert sorted(np.concatenate(shares)) == list(range(60_000))
    kinds = [len(np.unique(labels[share])) for share in shares]
    assert min(kinds) == 10 if iid else max(kinds) <= 4  # a shard may lie across two digits


def test_the_networks_have_the_papers_sizes() -> None:
    sizes = [
        sum(p.numel() for p in net.parameters()) for net in (heart.network(), two_nn.network())
    ]

    assert sizes == [14, 199_210]
    assert sum(value.numel() for value in robust.zero().values()) == 7_850


@pytest.mark.parametrize(("hostile", "factor"), [(False, -0.5), (True, 5.0)])
def test_a_hostile_worker_goes_ten_times_as_far_uphill(hostile: bool, factor: float) -> None:
    draw = np.random.default_rng(1)
    x, y = draw.random((30, 784), np.float32), draw.integers(10, size=30)
    part = data.Part(torch.from_numpy(x), torch.from_numpy(y))
    zero = {name: value.numpy() for name, value in robust.zero().items()}

    result = robust.Labourer(part, hostile=hostile).fit(zero, {}, None)  # type: ignore[arg-type]

    errors = np.full((30, 10), 0.1) - np.eye(10)[y]  # of softmax at zero weights
    np.testing.assert_allclose(result.weights["weight"], factor * errors.T @ x / 30, atol=1e-6)
    np.testing.assert_allclose(result.weights["bias"], factor * errors.mean(0), atol=1e-6)


def test_the_hospitals_are_trained_as_published(patients: data.Heart) -> None:
    # Looked at after each round, as `make papers` does: looking must not draw from their generator.
    *_, found = [heart.accuracies(patients, one) for one in alone(patients, 42, heart.ROUNDS)]

    assert found == pytest.approx(heart.PUBLISHED[42], abs=1e-9)


@pytest.mark.system
def test_the_server_averages_the_hospitals_to_the_last_bit(
    patients: data.Heart, tmp_path: Path
) -> None:
    expected = list(alone(patients, 43, 4))

    with Federation(tmp_path) as federation:
        found = list(heart.trained(federation, patients, 43, rounds=4))
        unweighted = list(heart.trained(federation, patients, 43, "uniform", rounds=1))

    for weights, wanted in zip(found, expected, strict=True):
        assert all(torch.equal(weights[name], wanted[name]) for name in wanted)
    assert not torch.equal(unweighted[0]["0.weight"], expected[0]["0.weight"])


def test_without_data_it_says_which_it_wants_and_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[Any]
) -> None:
    monkeypatch.setattr(sys, "argv", ["papers", "--data", str(tmp_path)])

    assert command.main() == 2

    said = capsys.readouterr().out
    assert all(
        f"{check} is left out: there is no {tmp_path}" in said for check in ("P1", "P2", "P3")
    )


def test_what_was_kept_of_one_run_is_published_with_the_next(tmp_path: Path) -> None:
    results, page = tmp_path / "results" / "papers.json", tmp_path / "page.md"
    page.write_text(f"# Page\n\n{report.BEGIN}\nof last time\n{report.END}\n\nThe end.\n")
    hit = report.Row("P3", "mean", "11.4 % ± 0.3", "11.42 %", passed=True)
    miss = report.Row("P1", "seed 42", "0.7", "0.6", passed=False)

    report.keep(results, "P3", report.Outcome([hit], {"mean": [11.42]}))
    report.keep(results, "P1", report.Outcome([miss], {"seed 42": [60.0]}))
    report.publish(page, report.kept(results))

    lines = page.read_text().splitlines()
    assert "| P1 | seed 42 | 0.7 | 0.6 | **missed** |" in lines
    assert "| P3 | mean | 11.4 % ± 0.3 | 11.42 % | passed |" in lines
    assert (lines[0], lines[-1]) == ("# Page", "The end.")
    assert "of last time" not in lines
    assert [one.passed for one in report.kept(results).values()] == [False, True]


@pytest.mark.heavy
@pytest.mark.system
@pytest.mark.timeout(3 * 3600)
@pytest.mark.parametrize("check", ["P1", "P2", "P3"])
def test_published_results_are_reproduced(check: str, tmp_path: Path) -> None:
    if why := data.missing(data.FOLDER, data.HEART if check == "P1" else data.MNIST):
        pytest.skip(why)

    subprocess.run(
        [sys.executable, "-m", "benchmarks.papers", check, "--json", tmp_path / "result.json"],
        cwd=ROOT,
        check=True,
    )
