"""Calibration reports of models, as numbers and as pictures."""

from typing import Any

from django.conf import settings
from django.http import HttpResponse, HttpResponseBase
from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import OpenApiParameter, extend_schema
from rest_framework.request import Request

from fl_server_ai.services.calibration import (
    calibration_ask,
    calibration_png,
    calibration_report_of,
    calibration_svg,
    labels_from_file,
    labels_from_json,
)
from fl_server_ai.services.inference import method_of, subject_of
from fl_server_ai.services.inference_inputs import named_calibration
from fl_server_api.auth import caller
from fl_server_api.idempotency import once
from fl_server_api.serializers.inference import (
    CalibrationForm,
    CalibrationInput,
    CalibrationOutput,
    InferencePending,
    encoded,
)
from fl_server_api.throttling import INFERENCES
from fl_server_api.uploads import refuse_large
from fl_server_api.views.base import View, answers, parsed
from fl_server_api.views.inference import REFUSALS, input_given, unfinished, waited
from fl_server_core.exceptions import Invalid
from fl_server_core.models import InferenceJob
from fl_server_core.models.inference import JobKind
from fl_server_core.selectors import get_visible, inference_jobs_visible_to

ROUTE = "calibrations"
FORMATS = ("json", "svg", "png")
ANSWERS = {
    (200, "application/json"): CalibrationOutput,
    202: InferencePending,
}
PICTURES = {(200, "image/svg+xml"): OpenApiTypes.BINARY, (200, "image/png"): OpenApiTypes.BINARY}


class CalibrationsView(View):
    """Judging a model."""

    rates = {"POST": INFERENCES}

    def initial(self, request: Request, *args: Any, **kwargs: Any) -> None:
        super().initial(request, *args, **kwargs)
        refuse_large(request, settings.FL_MAX_INPUT_BYTES)

    @extend_schema(
        operation_id="calibration",
        request={"application/json": CalibrationInput, "multipart/form-data": CalibrationForm},
        responses=answers(ANSWERS, *REFUSALS),
    )
    def post(self, request: Request, pk: str) -> HttpResponseBase:
        """Judge a model that you see by a labelled batch: ECE, NLL, Brier score, accuracy, AUROC of error detection.

        With an `Idempotency-Key` the same question again is not asked twice.
        """
        user = caller(request)
        subject = subject_of(user=user, model_id=pk)
        files = "model_input" in request.FILES
        body = parsed(CalibrationForm if files else CalibrationInput, request)
        told, dtype, batch = body["labels"], body.get("dtype"), body.get("calibration_input")
        method, options = method_of(subject, body.get("uncertainty_method"), body["options"])
        labels = labels_from_file(told.staged_path) if files else labels_from_json(told)
        tensor = input_given(body["model_input"], dtype)
        with named_calibration():
            calibration = None if batch is None else input_given(batch, dtype)

        def act() -> dict[str, int]:
            job = calibration_ask(
                user=user, subject=subject, tensor=tensor, labels=labels, method=method,
                options=options, bins=body["bins"], calibration=calibration,
            )  # fmt: skip
            return {"job_id": job.pk}

        job = get_visible(inference_jobs_visible_to(user), once(request, act)["job_id"])
        return _told(request, waited(job), "json")


class CalibrationView(View):
    """One of one's own reports."""

    @extend_schema(
        operation_id="calibration_report",
        parameters=[OpenApiParameter("format", str, enum=FORMATS, description="json if left out.")],
        responses=answers({**ANSWERS, **PICTURES}, *REFUSALS),
    )
    def get(self, request: Request, pk: str) -> HttpResponseBase:
        """The report, or its reliability diagram; its refusal, or 202 while there is none."""
        jobs = inference_jobs_visible_to(caller(request)).filter(kind=JobKind.CALIBRATION)
        job = get_visible(jobs, pk)
        wanted = request.query_params.get("format", "json")
        if wanted not in FORMATS:
            raise Invalid(f"format is one of {', '.join(FORMATS)}", code="BAD_FORMAT")
        return _told(request, job, wanted)


def _told(request: Request, job: InferenceJob, wanted: str) -> HttpResponseBase:
    waits = unfinished(request, job, ROUTE)
    if waits is not None:
        return waits
    report = calibration_report_of(job)
    if wanted == "svg":
        return HttpResponse(calibration_svg(report), content_type="image/svg+xml")
    if wanted == "png":
        return HttpResponse(calibration_png(report), content_type="image/png")
    body = encoded({"job_id": job.pk, "state": job.state, **report, "notes": job.notes})
    return HttpResponse(body, content_type="application/json")
