"""What a client is asked to do: long-polled, reported on, answered."""

import math
from typing import Any

from drf_spectacular.utils import OpenApiParameter, extend_schema
from rest_framework.request import Request
from rest_framework.response import Response

from fl_server_ai.services.joining import initial_submit
from fl_server_ai.services.tasks import task_failure, task_look, task_progress, task_wait
from fl_server_ai.services.updates import metrics_submit
from fl_server_api.auth import caller
from fl_server_api.files import model_file
from fl_server_api.parsers import strict_json
from fl_server_api.polling import poll_of
from fl_server_api.serializers.common import Detail
from fl_server_api.serializers.models import UpdateCreated
from fl_server_api.serializers.trainings import (
    FailureInput,
    ProgressInput,
    ProgressOutput,
    ResultInput,
    ResultMeta,
    TaskAnswer,
)
from fl_server_api.throttling import UPLOADS
from fl_server_api.views.base import View, answers, parsed
from fl_server_api.views.models import submit
from fl_server_core.exceptions import Invalid
from fl_server_core.lifecycle import TaskKind, TaskState
from fl_server_core.models import Task
from fl_server_core.selectors import get_visible, tasks_visible_to
from fl_server_core.services.rounds import update_expected


def _task(request: Request, pk: str) -> Task:
    return get_visible(tasks_visible_to(caller(request)), pk)


class TasksView(View):
    """The question of every client."""

    @extend_schema(
        operation_id="tasks_next",
        parameters=[OpenApiParameter("wait", float, description="Seconds to hold the question.")],
        responses=answers({200: TaskAnswer}, 400),
    )
    def get(self, request: Request) -> Response:
        """What to do now; asking again gives the same task until it is finished."""
        try:
            seconds = float(request.query_params.get("wait", "0"))
        except ValueError:
            seconds = math.nan
        if not math.isfinite(seconds):
            raise Invalid("wait is a number of seconds", code="BAD_WAIT")
        user, poll = caller(request), poll_of(request)
        if poll is None:
            return Response(task_wait(user=user, seconds=seconds))
        look = task_look(user=user)
        poll.note(user=user, look=look, seconds=seconds)
        return Response(look.answer)


class TaskProgressView(View):
    """A heartbeat."""

    @extend_schema(
        operation_id="tasks_progress",
        request={"application/json": ProgressInput},
        responses=answers({200: ProgressOutput}, 400, 404, 415),
    )
    def post(self, request: Request, pk: str) -> Response:
        """Say how far you are; learn whether to stop."""
        task = _task(request, pk)
        body = parsed(ProgressInput, request)
        return Response(task_progress(task=task, user=caller(request), **body))


class TaskFailureView(View):
    """Giving up."""

    @extend_schema(
        operation_id="tasks_failure",
        request=FailureInput,
        responses=answers({200: Detail}, 400, 404, 415),
    )
    def post(self, request: Request, pk: str) -> Response:
        """Say that you can't do this; the round goes on without you."""
        task = _task(request, pk)
        body = parsed(FailureInput, request)
        task_failure(task=task, user=caller(request), **body)
        return Response({"detail": "Failure noted"})


class TaskResultView(View):
    """The answer to a task."""

    rates = {"POST": UPLOADS}

    @extend_schema(
        operation_id="tasks_result",
        request={"multipart/form-data": ResultInput},
        responses=answers(
            {200: UpdateCreated, 201: UpdateCreated}, 400, 404, 409, 415, 422, 503, 507
        ),
    )
    def post(self, request: Request, pk: str) -> Response:
        """Send what was trained or measured; the same as posting to the model."""
        task = _task(request, pk)
        if task.kind == TaskKind.TRAIN:
            update_expected(training=task.round.training, owner=caller(request), number=task.number)
        body = parsed(ResultInput, request)
        meta = _meta(body["meta"])
        model_id = str(task.round.training.model_id)
        metrics: dict[str, float | bytes] = dict(meta.get("metrics", {}))
        if task.kind == TaskKind.EVALUATE:
            return _measured(request, task, model_id, metrics, meta["num_examples"])
        if task.kind == TaskKind.INITIAL_WEIGHTS:
            return _initial(request, task, body)
        fields = {**body, "round": task.number, "sample_size": meta["num_examples"]}
        fields |= {key: meta[key] for key in ("num_steps", "base_version", "sha256") if key in meta}
        return submit(request, model_id, fields, metrics)


def _initial(request: Request, task: Task, body: dict[str, Any]) -> Response:
    with model_file(request, body) as file:
        task, created, digest = initial_submit(
            task=task, owner=caller(request), file=file.staged_path, sha256=file.sha256
        )
    answer = {
        "detail": f"Initial Weights Accepted, sha256 {digest}",
        "update_id": task.pk,
        "round": task.number,
        "received": 1,
        "needed": 1,
        "deadline": None,
    }
    return Response(UpdateCreated(answer).data, status=201 if created else 200)


def _measured(
    request: Request, task: Task, model_id: str, metrics: dict[str, float | bytes], samples: int
) -> Response:
    metrics_submit(
        model_id=model_id,
        reporter=caller(request),
        metrics=metrics,
        sample_size=samples,
        round=task.number,
    )
    kinds = task.round.tasks.filter(kind=TaskKind.EVALUATE).values_list("state", flat=True)
    states = list(kinds)
    answer = {
        "detail": "Model Metrics Accepted",
        "update_id": task.pk,
        "round": task.number,
        "received": states.count(TaskState.DONE),
        "needed": states.count(TaskState.DONE) + states.count(TaskState.OPEN),
        "deadline": task.round.deadline,
    }
    return Response(UpdateCreated(answer).data, status=201)


def _meta(text: str) -> dict[str, Any]:
    try:
        found = strict_json(text)
    except ValueError as error:
        raise Invalid(f"meta can't be read as JSON: {str(error)[:200]}", code="BAD_META") from error
    body = ResultMeta(data=found)
    body.is_valid(raise_exception=True)
    result: dict[str, Any] = body.validated_data
    return result
