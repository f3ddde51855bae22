"""Does uncertainty find the errors? The least certain samples are set aside, and the rest is counted."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fl_server_ai.uncertainty.answer import refuse_non_finite
from fl_server_core.exceptions import Invalid


@dataclass(frozen=True)
class Ranking:
    """Accuracy of the most certain samples, for growing shares of them.

    Samples of equal uncertainty enter together, so no order is invented between them: `coverage` and `accuracy` have
    one point for each distinct uncertainty, the last at coverage 1. `auroc`: how probably an error is less
    certain than a hit, ties counting half; None if there are no errors, or nothing else.
    """

    coverage: tuple[float, ...]
    accuracy: tuple[float, ...]
    auroc: float | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def rank_errors(uncertainty: Tensor, correct: Tensor) -> Ranking:
    """Both (batch,): any measure that grows with doubt, and bool. Counts are exact integers.

    Raises NO_SAMPLES, BAD_LABEL (shapes or dtype) or NON_FINITE_OUTPUT.
    """
    if uncertainty.ndim != 1 or uncertainty.shape != correct.shape or correct.dtype != torch.bool:
        raise Invalid("one uncertainty and one bool a sample are needed", code="BAD_LABEL")
    if not len(correct):
        raise Invalid("a ranking needs at least one sample", code="NO_SAMPLES")
    refuse_non_finite(uncertainty, "its uncertainty")
    levels, place = torch.unique(uncertainty.double(), return_inverse=True)
    hits = torch.bincount(place[correct], minlength=len(levels))
    errors = torch.bincount(place[~correct], minlength=len(levels))
    kept = (hits + errors).cumsum(0)
    hits_so_far = hits.cumsum(0)
    # Twice Mann and Whitney's U: an error beats the hits below it, and half of those beside it.
    doubled = int((errors * (2 * (hits_so_far - hits) + hits)).sum())
    pairs = int(hits.sum()) * int(errors.sum())
    return Ranking(
        coverage=tuple((kept.double() / len(correct)).tolist()),
        accuracy=tuple((hits_so_far.double() / kept.double()).tolist()),
        auroc=doubled / (2 * pairs) if pairs else None,
    )
