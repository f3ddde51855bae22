"""A calibration report: how right a method's probabilities are on a labelled batch, and whether doubt finds errors."""

from typing import Any

from torch import Tensor

from fl_server_ai.uncertainty.answer import Answer
from fl_server_ai.uncertainty.calibration import calibrate
from fl_server_ai.uncertainty.ranking import rank_errors
from fl_server_core.exceptions import Invalid


def calibration_report(answer: Answer, labels: Tensor, bins: int) -> dict[str, Any]:
    """JSON: the fields of `Calibration`, `auroc` of error detection (null without both hits and errors) and `ranked_by`.

    The inference must be probabilities, (batch, classes), or (batch,) and (batch, 1) of the second of two.
    `labels`: (batch,), integers. Samples are ranked by their predictive entropy; without one by one minus
    confidence. Raises what `calibrate` does; what is wrong with labels points at them.
    """
    try:
        found = calibrate(answer.inference, labels, bins)
    except Invalid as error:
        if error.error_code not in {"BAD_LABEL", "NO_SAMPLES"}:
            raise
        errors = [{"pointer": "/labels", "code": "label", "detail": error.detail}]
        data = {**error.data, "errors": errors}
        raise Invalid(error.detail, code=error.error_code, **data) from error
    probs = answer.inference.double().reshape(len(labels), -1)
    yes = probs[:, 0]
    alone = probs.shape[1] == 1
    predicted = (yes > 0.5).long() if alone else probs.argmax(dim=1)
    confidence = yes.maximum(1 - yes) if alone else probs.amax(dim=1)
    entropy = answer.uncertainty.get("predictive_entropy")
    doubt = 1 - confidence if entropy is None else entropy.reshape(len(labels), -1)[:, 0]
    ranking = rank_errors(doubt, predicted == labels)
    return {
        **found.to_json(),
        "auroc": ranking.auroc,
        "ranked_by": "confidence" if entropy is None else "predictive_entropy",
    }
