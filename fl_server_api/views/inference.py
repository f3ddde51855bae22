"""Asking models, and what their answers' uncertainty can be made of."""

import json
import threading
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from django.conf import settings
from django.http import HttpResponse, HttpResponseBase
from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import OpenApiParameter, extend_schema
from rest_framework.request import Request
from rest_framework.response import Response

from fl_server_ai.containers import write_back
from fl_server_ai.sandbox.tensors import RawTensor
from fl_server_ai.services.inference import (
    inference_answer,
    inference_ask,
    inference_json,
    inference_wait,
    method_of,
    subject_of,
)
from fl_server_ai.services.inference_inputs import (
    input_from_file,
    input_from_json,
    named_calibration,
)
from fl_server_ai.uncertainty import UNCERTAINTY
from fl_server_ai.uncertainty.options import schema
from fl_server_api.auth import caller
from fl_server_api.idempotency import once
from fl_server_api.serializers.inference import (
    FORMATS,
    InferenceForm,
    InferenceInput,
    InferenceOutput,
    InferencePending,
    MethodOutput,
    encoded,
)
from fl_server_api.throttling import INFERENCES
from fl_server_api.uploads import StagedFile, refuse_large
from fl_server_api.views.base import View, answers, parsed
from fl_server_core.exceptions import Invalid
from fl_server_core.lifecycle import EventState
from fl_server_core.models import InferenceJob
from fl_server_core.models.inference import JobKind
from fl_server_core.selectors import get_visible, inference_jobs_visible_to
from fl_server_core.services.inference import job_error
from fl_server_core.storage import staging_path

ANSWERS = {
    (200, "application/json"): InferenceOutput,
    (200, "application/octet-stream"): OpenApiTypes.BINARY,
    202: InferencePending,
}
REFUSALS = (400, 404, 409, 415, 422, 503, 507)
# Each waits on a web thread; who finds no place is told at once where the answer will be.
_places = threading.BoundedSemaphore(32)


class InferencesView(View):
    """Questions to models."""

    rates = {"POST": INFERENCES}

    def initial(self, request: Request, *args: Any, **kwargs: Any) -> None:
        super().initial(request, *args, **kwargs)
        refuse_large(request, settings.FL_MAX_INPUT_BYTES)

    @extend_schema(
        operation_id="inference",
        request={"application/json": InferenceInput, "multipart/form-data": InferenceForm},
        responses=answers(ANSWERS, *REFUSALS),
    )
    def post(self, request: Request) -> HttpResponseBase:
        """Ask a model that you see. What takes longer than a moment is answered at `url`, for a day.

        With an `Idempotency-Key` the same question again is not asked twice.
        """
        form = (request.content_type or "").startswith("multipart/")
        file = "model_input" in request.FILES
        body = parsed(InferenceForm if file else InferenceInput, request)
        return_format = body.get("return_format", "binary" if form else "json")
        user, given, dtype = caller(request), body["model_input"], body.get("dtype")
        subject = subject_of(user=user, model_id=body["model_id"])
        method, options = method_of(subject, body.get("uncertainty_method"), body["options"])
        tensor, batch = input_given(given, dtype), body.get("calibration_input")
        with named_calibration():
            calibration = None if batch is None else input_given(batch, dtype)

        def act() -> dict[str, int]:
            job = inference_ask(
                user=user, subject=subject, tensor=tensor, method=method, options=options,
                return_format=return_format, calibration=calibration,
            )  # fmt: skip
            return {"job_id": job.pk}

        job = get_visible(inference_jobs_visible_to(user), once(request, act)["job_id"])
        return _told(request, waited(job), return_format)


class InferenceView(View):
    """One of one's own questions."""

    @extend_schema(
        operation_id="inference_answer",
        parameters=[OpenApiParameter("format", str, enum=FORMATS, description="As asked for.")],
        responses=answers(ANSWERS, *REFUSALS),
    )
    def get(self, request: Request, pk: str) -> HttpResponseBase:
        """What the POST would have answered: the answer, its refusal, or 202 while there is none."""
        jobs = inference_jobs_visible_to(caller(request)).filter(kind=JobKind.ANSWER)
        job = get_visible(jobs, pk)
        wanted = request.query_params.get("format", job.return_format)
        if wanted not in FORMATS:
            raise Invalid(f"format is one of {', '.join(FORMATS)}", code="BAD_FORMAT")
        return _told(request, job, wanted)


def input_given(given: Any, dtype: str | None) -> RawTensor:
    """What a form's file or a JSON value holds."""
    if isinstance(given, StagedFile):
        return input_from_file(given.staged_path, dtype)
    return input_from_json(given, dtype)


def waited(job: InferenceJob) -> InferenceJob:
    if not _places.acquire(blocking=False):
        return inference_wait(job=job, seconds=0)
    try:
        return inference_wait(job=job, seconds=settings.FL_INFERENCE_WAIT)
    finally:
        _places.release()


def unfinished(request: Request, job: InferenceJob, route: str) -> Response | None:
    """202 with where to ask again; None once there is an answer. A refusal is raised as it was."""
    if job.state == EventState.FAILED:
        raise job_error(job)
    if job.state == EventState.DONE:
        return None
    prefix = "/api/v1" if request.path.startswith("/api/v1/") else "/api"
    url = f"{prefix}/{route}/{job.pk}/"
    headers = {"Location": url, "Retry-After": "1"}
    return Response({"job_id": job.pk, "state": job.state, "url": url}, status=202, headers=headers)


def _told(request: Request, job: InferenceJob, wanted: str) -> HttpResponseBase:
    waits = unfinished(request, job, "inference")
    if waits is not None:
        return waits
    about = {"job_id": job.pk, "state": job.state}
    data = inference_answer(job)
    if wanted == "json":
        body = encoded({**about, **inference_json(data), "notes": job.notes})
        return HttpResponse(body, content_type="application/json")
    name = f"inference-{job.pk}.{'npz' if wanted == 'npz' else 'safetensors'}"
    return HttpResponse(
        _npz(data) if wanted == "npz" else data,
        content_type="application/octet-stream",
        headers={
            "Content-Disposition": f'attachment; filename="{name}"',
            **({"X-FL-Notes": json.dumps(job.notes)} if job.notes else {}),
        },
    )


def _npz(data: bytes) -> bytes:
    paths: list[Path] = [staging_path(".safetensors"), staging_path(".npz")]
    try:
        paths[0].write_bytes(data)
        write_back("npz", *paths)
        return paths[1].read_bytes()
    finally:
        for path in paths:
            path.unlink(missing_ok=True)


class MethodsView(View):
    """The uncertainty methods."""

    @extend_schema(
        operation_id="uncertainty_methods_list",
        responses=answers({200: MethodOutput(many=True)}),
    )
    def get(self, request: Request) -> Response:
        """Every method that an inference or a training may name, with the schema of its options."""
        return Response([_described(name) for name in UNCERTAINTY])


def _described(name: str) -> dict[str, Any]:
    kind = UNCERTAINTY[name]
    plain = {f.name: f.default for f in fields(kind.Options) if f.default is not MISSING}
    made = {
        f.name: f.default_factory()
        for f in fields(kind.Options)
        if f.default_factory is not MISSING
    }
    return {
        "name": name,
        "paper": kind.paper,
        "options_schema": schema(kind.Options),
        "defaults": {**plain, **made},
    }
