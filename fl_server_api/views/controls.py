"""Steering a training: each route does one thing, and doing it again is fine."""

from collections.abc import Callable
from typing import Any

from drf_spectacular.utils import extend_schema
from rest_framework.request import Request
from rest_framework.response import Response

from fl_server_ai.services.controls import (
    round_extend,
    training_cancel,
    training_pause,
    training_resume,
    training_retry,
)
from fl_server_api.auth import caller
from fl_server_api.serializers.trainings import ControlOutput, ExtendInput, ExtendOutput
from fl_server_api.views.base import View, answers, parsed
from fl_server_core.models import Training
from fl_server_core.selectors import get_visible, trainings_visible_to

STEERED = answers({200: ControlOutput}, 404, 409)


def _steer(request: Request, pk: str, act: Callable[..., Training], said: str) -> Response:
    user = caller(request)
    training = act(training=get_visible(trainings_visible_to(user), pk), user=user)
    return Response({"detail": said, "state": training.state})


class TrainingPauseView(View):
    """The pause."""

    @extend_schema(operation_id="trainings_pause", request=None, responses=STEERED)
    def post(self, request: Request, pk: str) -> Response:
        """Ask nobody for anything until the resume; deadlines stand still, answers are still taken."""
        return _steer(request, pk, training_pause, "Training paused")


class TrainingResumeView(View):
    """The end of a pause."""

    @extend_schema(operation_id="trainings_resume", request=None, responses=STEERED)
    def post(self, request: Request, pk: str) -> Response:
        """Go on where the pause began."""
        return _steer(request, pk, training_resume, "Training resumed")


class TrainingCancelView(View):
    """The early end."""

    @extend_schema(operation_id="trainings_cancel", request=None, responses=STEERED)
    def post(self, request: Request, pk: str) -> Response:
        """End a training for good; its versions stay."""
        return _steer(request, pk, training_cancel, "Training cancelled")


class TrainingRetryView(View):
    """Another attempt."""

    @extend_schema(operation_id="trainings_retry", request=None, responses=STEERED)
    def post(self, request: Request, pk: str) -> Response:
        """Take a training out of ERROR, at the step that failed; what was accepted stays."""
        return _steer(request, pk, training_retry, "Training retried")


class TrainingExtendView(View):
    """More time."""

    @extend_schema(
        operation_id="trainings_extend",
        request=ExtendInput,
        responses=answers({200: ExtendOutput}, 400, 404, 409, 415),
    )
    def post(self, request: Request, pk: str) -> Response:
        """Give the current round or test more time: until `deadline`, or `seconds` from now."""
        user = caller(request)
        training = get_visible(trainings_visible_to(user), pk)
        body: dict[str, Any] = parsed(ExtendInput, request)
        round = round_extend(training=training, user=user, **body)
        answer = {
            "detail": "Deadline extended",
            "state": round.training.state,
            "deadline": round.deadline,
            "remaining": round.remaining,
        }
        return Response(ExtendOutput(answer).data)
