"""Calibration reports: predictions of a labelled batch, judged by a worker; pictures are drawn when they are asked for."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from fl_server_ai.sandbox.tensors import RawTensor
from fl_server_ai.services.inference import Subject, inference_answer, inference_ask
from fl_server_ai.services.inference_inputs import IMAGE, input_from_file
from fl_server_ai.services.tensor_bytes import unpacked
from fl_server_ai.uncertainty.options import CommonOptions
from fl_server_ai.uncertainty.pictures import reliability_svg
from fl_server_ai.uncertainty.raster import reliability_png
from fl_server_core.exceptions import Invalid
from fl_server_core.models import GlobalModel, InferenceJob, User
from fl_server_core.models.inference import JobKind

LABELS, BINS, REPORT = "labels", "bins", "report"
MOST_BINS = 100
TASKS = ("multiclass", "binary")


def labels_from_json(value: Sequence[Any]) -> RawTensor:
    """A list of whole numbers. Raises `Invalid` (BAD_LABEL) with the first that is none."""
    for index, label in enumerate(value):
        if type(label) is not int or not 0 <= label < 2**31:
            raise _bad(f"label {index} is no whole number from 0", f"/labels/{index}")
    return RawTensor.of(np.array(value, np.int64), LABELS)


def labels_from_file(path: Path) -> RawTensor:
    """The only tensor in a file: one dimension, integers. The file is gone after."""
    try:
        found = input_from_file(path)
    except Invalid as error:
        raise _bad(error.detail) from error
    array = found.numpy()
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise _bad(
            f"labels are one dimension of integers, not {found.dtype} of shape {list(found.shape)}"
        )
    wrong = np.flatnonzero((array < 0) | (array >= 2**31))
    if len(wrong):
        raise _bad(f"label {wrong[0]} is {array[wrong[0]]}; labels are numbers of classes, from 0")
    return RawTensor.of(array.astype(np.int64), LABELS)


def calibration_ask(
    *,
    user: User,
    subject: Subject,
    tensor: RawTensor,
    labels: RawTensor,
    method: str,
    options: CommonOptions,
    bins: int,
    calibration: RawTensor | None = None,
) -> InferenceJob:
    """Store the question and hint at it; whether a label is one of the classes is seen when the model has answered.

    So is how many samples a model's preprocessing makes of the input. An image alone is one sample.
    `calibration` is as in `inference_ask`.
    """
    if options.task not in TASKS:
        raise Invalid(
            f"a calibration report is for {' or '.join(TASKS)} outputs, not for {options.task}",
            code="BAD_OPTION",
            errors=[
                {
                    "pointer": "/options/uncertainty/task",
                    "code": "choice",
                    "detail": ", ".join(TASKS),
                }
            ],
        )
    (count,) = labels.shape
    rows = 1 if tensor.name == IMAGE else tensor.shape[0] if tensor.shape else 0
    if not count:
        said = "calibration needs at least one labelled sample"
        fault = {"pointer": "/labels", "code": "empty", "detail": "there is none"}
        raise Invalid(said, code="NO_SAMPLES", errors=[fault])
    if count != rows and not _prepares(subject.model):
        raise _bad(f"{count} labels for {rows} samples; each sample needs one")
    return inference_ask(
        user=user, subject=subject, tensor=tensor, method=method, options=options,
        return_format="json", kind=JobKind.CALIBRATION, calibration=calibration,
        more=[replace(labels, name=LABELS), RawTensor.of(np.array(bins), BINS)],
    )  # fmt: skip


def _prepares(model: GlobalModel) -> bool:
    """Whether the model, or a member of it, may make another number of samples of its input."""
    members = model.members.filter(model__preprocessing__isnull=False)
    return model.preprocessing_id is not None or members.exists()


def calibration_report_of(job: InferenceJob) -> dict[str, Any]:
    """A finished job's report."""
    raw = unpacked(inference_answer(job))[REPORT]
    found: dict[str, Any] = json.loads(bytes(raw.data))
    return found


def calibration_svg(report: dict[str, Any]) -> bytes:
    """The reliability diagram."""
    return reliability_svg(_plain(report)).encode()


def calibration_png(report: dict[str, Any]) -> bytes:
    """The same, in pixels."""
    return reliability_png(_plain(report))


def _plain(report: dict[str, Any]) -> Any:
    """With attributes, as the dataclass has them, which can't be imported without torch."""
    return SimpleNamespace(**{**report, "bins": [SimpleNamespace(**b) for b in report["bins"]]})


def _bad(detail: str, pointer: str = "/labels") -> Invalid:
    return Invalid(
        detail, code="BAD_LABEL", errors=[{"pointer": pointer, "code": "label", "detail": detail}]
    )
