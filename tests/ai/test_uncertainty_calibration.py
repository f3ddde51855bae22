"""Calibration and ranking, against scikit-learn and by hand."""

import json
import math
from xml.etree import ElementTree as ET

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from sklearn.metrics import log_loss, roc_auc_score

from fl_server_ai.uncertainty.calibration import calibrate
from fl_server_ai.uncertainty.pictures import coverage_svg, reliability_svg
from fl_server_ai.uncertainty.ranking import Ranking, rank_errors
from fl_server_core.exceptions import DomainError

SVG = "{http://www.w3.org/2000/svg}"


def parsed(svg: str) -> ET.Element:
    return ET.fromstring(svg)  # noqa: S314  # our own picture


def batch(samples: int = 300, classes: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(samples, classes, generator=generator, dtype=torch.float64)
    return logits.softmax(1), torch.randint(0, classes, (samples,), generator=generator)


def test_figures_agree_with_scikit_learn_and_numpy() -> None:
    probs, labels = batch()

    report = calibrate(probs, labels)

    table, truth = probs.numpy(), labels.numpy()
    assert report.samples == 300
    assert report.accuracy == pytest.approx((table.argmax(1) == truth).mean())
    assert report.nll == pytest.approx(log_loss(truth, table, labels=range(5)))
    assert report.brier == pytest.approx(((table - np.eye(5)[truth]) ** 2).sum(1).mean())
    assert report.ece == pytest.approx(plain_ece(table, truth, 15))


def plain_ece(
    table: "np.ndarray[tuple[int, int], np.dtype[np.float64]]",
    truth: "np.ndarray[tuple[int], np.dtype[np.int64]]",
    bins: int,
) -> float:
    confidence, hit = table.max(1), table.argmax(1) == truth
    total = 0.0
    for index in range(bins):
        inside = (confidence > index / bins) & (confidence <= (index + 1) / bins)
        if inside.any():
            total += inside.mean() * abs(hit[inside].mean() - confidence[inside].mean())
    return total


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_each_sample_is_in_one_bin_edges_in_the_lower(bins: int) -> None:
    confidence = torch.tensor([0.5, 0.6, 0.7, 0.8, 0.9, 1.0], dtype=torch.float64)
    probs = torch.stack([confidence, 1 - confidence], 1)

    report = calibrate(probs, torch.zeros(6, dtype=torch.int64), bins)

    assert sum(part.count for part in report.bins) == 6
    assert len(report.bins) == bins
    assert report.bins[-1].high == 1.0
    if bins == 10:
        assert [part.count for part in report.bins] == [0, 0, 0, 0, 1, 1, 1, 1, 1, 1]


def test_certain_and_right_is_perfect_and_certain_and_wrong_is_finite() -> None:
    right = calibrate(torch.eye(3), torch.arange(3))
    wrong = calibrate(torch.eye(3), torch.tensor([1, 2, 0]))

    assert (right.accuracy, right.nll, right.brier, right.ece) == (1, 0, 0, 0)
    assert (wrong.accuracy, wrong.brier, wrong.ece) == (0, 2, 1)
    assert wrong.nll == pytest.approx(52 * math.log(2))
    json.dumps(wrong.to_json(), allow_nan=False)


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_one_column_is_the_probability_of_the_second_class(shape: tuple[int, ...]) -> None:
    yes = torch.tensor([0.9, 0.2, 0.6, 0.4], dtype=torch.float64)
    labels = torch.tensor([1, 0, 0, 0])

    one, two = (
        calibrate(yes.reshape(shape), labels),
        calibrate(torch.stack([1 - yes, yes], 1), labels),
    )

    assert one == two
    assert one.accuracy == 0.75


@pytest.mark.parametrize(
    ("probs", "labels", "code"),
    [
        (torch.ones(0, 3), torch.ones(0, dtype=torch.int64), "NO_SAMPLES"),
        (torch.eye(3), torch.tensor([0, 1, 3]), "BAD_LABEL"),
        (torch.eye(3), torch.tensor([0, -1, 2]), "BAD_LABEL"),
        (torch.eye(3), torch.tensor([0, 1]), "BAD_LABEL"),
        (torch.eye(3), torch.tensor([0.0, 1.0, 2.0]), "BAD_LABEL"),
        (torch.eye(3) * 7, torch.arange(3), "NOT_PROBABILITIES"),
        (torch.eye(3) * float("nan"), torch.arange(3), "NON_FINITE_OUTPUT"),
        (torch.ones(3, 1, 1), torch.arange(3), "OUTPUT_SHAPE"),
    ],
)
def test_bad_batches_are_refused(probs: torch.Tensor, labels: torch.Tensor, code: str) -> None:
    with pytest.raises(DomainError) as refusal:
        calibrate(probs, labels)

    assert refusal.value.error_code == code


# --- ranking ---------------------------------------------------------------------------------


def test_the_curve_keeps_the_most_certain_and_lets_ties_in_together() -> None:
    uncertainty = torch.tensor([0.3, 0.1, 0.2, 0.2])
    correct = torch.tensor([False, True, True, False])

    ranking = rank_errors(uncertainty, correct)

    assert ranking.coverage == (0.25, 0.75, 1.0)
    assert ranking.accuracy == (1.0, 2 / 3, 0.5)
    assert ranking.auroc == 3.5 / 4


def test_no_errors_or_nothing_but_errors_have_no_auroc() -> None:
    uncertainty = torch.tensor([0.3, 0.1])

    for correct in (torch.tensor([True, True]), torch.tensor([False, False])):
        ranking = rank_errors(uncertainty, correct)
        assert ranking.auroc is None
        assert '"auroc": null' in json.dumps(ranking.to_json(), allow_nan=False)


@settings(max_examples=80, deadline=None)
@given(rows=some.lists(some.tuples(some.integers(0, 5), some.booleans()), min_size=1, max_size=40))
def test_auroc_is_scikit_learns_with_any_ties(rows: list[tuple[int, bool]]) -> None:
    uncertainty = torch.tensor([level / 7 for level, _ in rows])
    correct = torch.tensor([hit for _, hit in rows])

    ranking = rank_errors(uncertainty, correct)

    if correct.all() or not correct.any():
        assert ranking.auroc is None
    else:
        assert ranking.auroc == pytest.approx(
            roc_auc_score(~correct.numpy(), uncertainty), abs=1e-12
        )
    assert ranking.coverage[-1] == 1.0
    assert ranking.accuracy[-1] == pytest.approx(correct.double().mean().item())
    assert ranking == rank_errors(uncertainty.flip(0), correct.flip(0))


@pytest.mark.parametrize(
    ("uncertainty", "correct", "code"),
    [
        (torch.ones(0), torch.ones(0, dtype=torch.bool), "NO_SAMPLES"),
        (torch.ones(2), torch.ones(3, dtype=torch.bool), "BAD_LABEL"),
        (torch.ones(2), torch.ones(2), "BAD_LABEL"),
        (torch.tensor([1.0, float("nan")]), torch.ones(2, dtype=torch.bool), "NON_FINITE_OUTPUT"),
    ],
)
def test_bad_rankings_are_refused(
    uncertainty: torch.Tensor, correct: torch.Tensor, code: str
) -> None:
    with pytest.raises(DomainError) as refusal:
        rank_errors(uncertainty, correct)

    assert refusal.value.error_code == code


# --- pictures --------------------------------------------------------------------------------


def test_a_reliability_picture_has_one_bar_for_each_bin_with_samples() -> None:
    report = calibrate(*batch())

    root = parsed(reliability_svg(report, "A < B & C"))

    bars = [r for r in root.findall(f"{SVG}rect") if r.find(f"{SVG}title") is not None]
    assert len(bars) == sum(part.count > 0 for part in report.bins)
    assert root.findtext(f"{SVG}title") == "A < B & C"
    assert any(f"ECE {report.ece:.3f}" in (text.text or "") for text in root.iter(f"{SVG}text"))


def test_a_coverage_picture_has_one_line_a_method_inside_its_frame() -> None:
    rankings = {
        "<NONE>": Ranking((1.0,), (0.72,), None),
        "SWAG": rank_errors(torch.arange(3000.0), torch.arange(3000) % 7 != 0),
    }

    text = coverage_svg(rankings)

    root = parsed(text)
    lines = root.findall(f"{SVG}polyline")
    points = [
        tuple(map(float, p.split(","))) for line in lines for p in line.attrib["points"].split()
    ]
    assert len(lines) == 2
    assert all(56 <= x <= 396 and 44 <= y <= 324 for x, y in points)
    assert any("<NONE>   no AUROC" in (text.text or "") for text in root.iter(f"{SVG}text"))
    assert len(text) < 60_000


def test_one_wrong_sample_among_the_most_certain_does_not_stretch_the_picture() -> None:
    correct = torch.ones(1000, dtype=torch.bool)
    correct[0] = False

    root = parsed(coverage_svg({"SWAG": rank_errors(torch.arange(1000.0), correct)}))

    assert "0.95" in [text.text for text in root.iter(f"{SVG}text")]


def test_pictures_of_extremes_are_well_formed() -> None:
    perfect = rank_errors(torch.arange(4.0), torch.ones(4, dtype=torch.bool))

    for rankings in ({}, {"all right": perfect}):
        parsed(coverage_svg(rankings))
    parsed(reliability_svg(calibrate(torch.eye(2), torch.tensor([1, 0]))))
