"""Are the probabilities right? Guo et al. 2017, https://arxiv.org/abs/1706.04599."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fl_server_ai.uncertainty.answer import first_sample, refuse_non_finite
from fl_server_core.exceptions import Invalid, Unusable

FLOOR = 2.0**-52  # the least probability that the NLL knows; an exact 0 would make it infinite


@dataclass(frozen=True)
class Bin:
    """Samples whose confidence lies in (low, high]; the means are None where there are none."""

    low: float
    high: float
    count: int
    confidence: float | None
    accuracy: float | None


@dataclass(frozen=True)
class Calibration:
    """Figures of a labelled batch. Confidence is the largest probability of a sample.

    ece: mean of |accuracy - confidence| over the bins, weighted by their counts. nll: mean of -log p(label),
    in nats. brier: mean of the squared error summed over the classes, 0 to 2.
    """

    samples: int
    accuracy: float
    nll: float
    brier: float
    ece: float
    bins: tuple[Bin, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def calibrate(probs: Tensor, labels: Tensor, bins: int = 15) -> Calibration:
    """Judge probabilities (batch, classes) by labels (batch,), integers; figures are counted in float64.

    Probabilities of the second of two classes may come alone, as (batch,) or (batch, 1). The bins have equal
    width; the first also takes confidence 0. Of equal probabilities the first class is the prediction.
    Raises NO_SAMPLES, BAD_LABEL, NOT_PROBABILITIES, NON_FINITE_OUTPUT or OUTPUT_SHAPE.
    """
    if bins < 1:
        raise Invalid(f"there cannot be {bins} bins", code="BAD_OPTION")
    table = _two_columns(probs).double()
    labels = _checked_labels(labels, table)
    if table.shape[0] == 0:
        raise Invalid("calibration needs at least one labelled sample", code="NO_SAMPLES")
    refuse_non_finite(table, "a probability")
    off = (table < -1e-2) | ((table.sum(dim=1, keepdim=True) - 1).abs() > 1e-2)
    if (sample := first_sample(off)) is not None:
        raise Unusable(
            f"sample {sample}: these are no probabilities; calibrate the inference of a method that "
            "was asked with output: logits or output: probs",
            code="NOT_PROBABILITIES",
            sample=sample,
        )
    confidence, predicted = table.max(dim=1)
    correct = (predicted == labels).double()
    chosen = table.gather(1, labels[:, None])[:, 0]
    right = torch.zeros_like(table).scatter_(1, labels[:, None], 1.0)
    curve = _bins(confidence, correct, bins)
    gaps = (b.count * abs(b.accuracy - b.confidence) for b in curve if b.count)  # type: ignore[operator]
    return Calibration(
        samples=len(labels),
        accuracy=correct.mean().item(),
        nll=-chosen.clamp(FLOOR, 1.0).log().mean().item(),
        brier=(table - right).square().sum(dim=1).mean().item(),
        ece=sum(gaps) / len(labels),
        bins=curve,
    )


def _two_columns(probs: Tensor) -> Tensor:
    if probs.ndim == 1:
        probs = probs[:, None]
    if probs.ndim != 2 or probs.shape[1] == 0 or probs.is_complex():
        raise Unusable(
            f"probabilities of shape {tuple(probs.shape)}; (batch, classes) is wanted",
            code="OUTPUT_SHAPE",
        )
    return torch.cat([1 - probs.double(), probs.double()], 1) if probs.shape[1] == 1 else probs


def _checked_labels(labels: Tensor, table: Tensor) -> Tensor:
    if labels.shape != table.shape[:1] or labels.is_floating_point() or labels.is_complex():
        raise Invalid(f"labels must be {table.shape[0]} integers", code="BAD_LABEL")
    labels = labels.to(table.device, torch.int64)
    if (sample := first_sample((labels < 0) | (labels >= table.shape[1]))) is not None:
        raise Invalid(
            f"label {int(labels[sample])} of sample {sample} is none of {table.shape[1]} classes",
            code="BAD_LABEL",
            sample=sample,
        )
    return labels


def _bins(confidence: Tensor, correct: Tensor, bins: int) -> tuple[Bin, ...]:
    edges = torch.arange(bins + 1, dtype=torch.float64, device=confidence.device) / bins
    place = (torch.bucketize(confidence, edges) - 1).clamp(
        0, bins - 1
    )  # edges[i] < x <= edges[i + 1]
    counts = torch.bincount(place, minlength=bins).tolist()
    sums = torch.bincount(place, weights=confidence, minlength=bins).tolist()
    hits = torch.bincount(place, weights=correct, minlength=bins).tolist()
    return tuple(
        Bin(
            low=index / bins,
            high=(index + 1) / bins,
            count=count,
            confidence=sums[index] / count if count else None,
            accuracy=hits[index] / count if count else None,
        )
        for index, count in enumerate(counts)
    )
