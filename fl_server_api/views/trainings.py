"""Trainings: creating, starting and watching them, and who takes part."""

import json
from typing import Any

from drf_spectacular.utils import extend_schema
from rest_framework.request import Request
from rest_framework.response import Response

from fl_server_ai.services.trainings import (
    training_clients_remove,
    training_create,
    training_start,
)
from fl_server_api.auth import caller
from fl_server_api.idempotency import create_once
from fl_server_api.listing import listed, parameters
from fl_server_api.serializers.clients import own_only
from fl_server_api.serializers.common import Detail
from fl_server_api.serializers.models import ANY_MODEL, GlobalModelOutput, LocalModelOutput
from fl_server_api.serializers.trainings import (
    ClientsInput,
    TrainingCreated,
    TrainingDetail,
    TrainingInput,
    TrainingOutput,
)
from fl_server_api.views.base import View, answers, parsed
from fl_server_core.exceptions import Invalid
from fl_server_core.lifecycle import TaskKind
from fl_server_core.models import Training
from fl_server_core.selectors import (
    gaps,
    get_visible,
    is_admin,
    local_models_visible_to,
    models_visible_to,
    trainings_visible_to,
    with_gaps,
)
from fl_server_core.services.blocked import blocked_on
from fl_server_core.services.clients import training_missing, training_shares
from fl_server_core.services.rounds import current_round, round_tally
from fl_server_core.services.trainings import training_add_clients, training_delete

FILTERS = {
    "state": "state", "aggregation_method": "aggregation_method", "actor": "actor", "model": "model",
}  # fmt: skip
ORDERING = ["created_at", "last_update", "state"]


def _training(request: Request, pk: str) -> Training:
    return get_visible(trainings_visible_to(caller(request)), pk)


class TrainingsView(View):
    """All trainings that one sees."""

    @extend_schema(
        operation_id="trainings_list",
        parameters=parameters(FILTERS, ORDERING),
        responses=answers({200: TrainingOutput(many=True)}, 400, 404),
    )
    def get(self, request: Request) -> Response:
        """The trainings that you started or take part in."""
        rows = with_gaps(trainings_visible_to(caller(request)))
        rows = rows.select_related("model__current_version").prefetch_related("memberships")
        return listed(request, rows, TrainingOutput, filters=FILTERS, ordering=ORDERING)

    @extend_schema(
        operation_id="trainings_create",
        request=TrainingInput,
        responses=answers({201: TrainingCreated}, 400, 404, 409, 415, 422),
    )
    def post(self, request: Request) -> Response:
        """Create a training of one of your models; it waits for its start."""
        body = parsed(TrainingInput, request)
        _storable(body["options"])

        def act() -> dict[str, Any]:
            user = caller(request)
            model = get_visible(models_visible_to(user), body.pop("model_id"))
            training = training_create(actor=user, model=model, **body)
            return {
                "detail": "Training created",
                "training_id": str(training.pk),
                "model_id": str(training.model_id),
            }

        return create_once(request, act)


def _storable(options: dict[str, Any]) -> None:
    """Refuse what came through a form and no JSON column would take."""
    try:
        text = json.dumps(options, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise Invalid("options must be a JSON object", code="BAD_OPTION") from error
    if "\\u0000" in text:
        raise Invalid("options hold a NUL character", code="BAD_OPTION")


class TrainingView(View):
    """One training."""

    @extend_schema(operation_id="trainings_retrieve", responses=answers({200: TrainingDetail}, 404))
    def get(self, request: Request, pk: str) -> Response:
        """A training, and how far its current round is."""
        training: Any = _training(request, pk)
        round = current_round(training)
        tally = round_tally(round, TaskKind.TRAIN) if round else None
        members = [m for m in training.memberships.all() if m.removed_at is None]
        training.local_models_arrived = tally.done if tally else 0
        training.local_models_expected = tally.done + tally.open if tally else len(members)
        user = caller(request)
        training.gaps = gaps(training=training, visible_to=user)
        training.blocked_on = blocked_on(training=training, visible_to=user)
        steers = user.pk == training.actor_id or is_admin(user)
        training.missing = own_only(training_missing(training), user, all_of_them=steers)
        training.shares = own_only(training_shares(training), user, all_of_them=steers)
        return Response(TrainingDetail(training).data)

    @extend_schema(operation_id="trainings_destroy", responses=answers({200: Detail}, 404, 409))
    def delete(self, request: Request, pk: str) -> Response:
        """Delete a training that is not running; its model stays."""
        training_delete(training=_training(request, pk), user=caller(request))
        return Response({"detail": "Training removed"})


class TrainingClientsView(View):
    """Who takes part."""

    @extend_schema(
        operation_id="trainings_clients_add",
        request=ClientsInput,
        responses=answers({202: Detail}, 400, 404, 409, 415),
    )
    def put(self, request: Request, pk: str) -> Response:
        """Let clients take part, from the next round on."""
        training = _training(request, pk)
        clients = parsed(ClientsInput, request)["clients"]
        training_add_clients(training=training, user=caller(request), clients=clients)
        return Response({"detail": "Training Participants Accepted"}, status=202)

    @extend_schema(
        operation_id="trainings_clients_remove",
        request=ClientsInput,
        responses=answers({200: Detail}, 400, 404, 409, 415),
    )
    def delete(self, request: Request, pk: str) -> Response:
        """Take clients out, at once; the round goes on without them."""
        training = _training(request, pk)
        clients = parsed(ClientsInput, request)["clients"]
        training_clients_remove(training=training, user=caller(request), clients=clients)
        return Response({"detail": "Training Participants Removed"})


class TrainingStartView(View):
    """The start."""

    @extend_schema(
        operation_id="trainings_start", request=None, responses=answers({202: Detail}, 404, 409)
    )
    def post(self, request: Request, pk: str) -> Response:
        """Start a training."""
        training_start(training=_training(request, pk), user=caller(request))
        return Response({"detail": "Training Started"}, status=202)


class TrainingModelsView(View):
    """A training's models."""

    newest_only = False

    @extend_schema(operation_id="trainings_models", responses=answers({200: ANY_MODEL}, 404))
    def get(self, request: Request, pk: str) -> Response:
        """The global model, then the updates that you may see."""
        training = _training(request, pk)
        user = caller(request)
        local = local_models_visible_to(user).filter(training=training).order_by("-created_at")
        rows = list(local)
        if self.newest_only:
            rows = list({row.owner_id: row for row in reversed(rows)}.values())
        shared = models_visible_to(user).filter(pk=training.model_id)
        return Response(
            [*GlobalModelOutput(shared, many=True).data, *LocalModelOutput(rows, many=True).data]
        )


class TrainingLatestModelsView(TrainingModelsView):
    """The newest of each."""

    newest_only = True

    @extend_schema(
        operation_id="trainings_models_latest",
        responses=answers({200: ANY_MODEL}, 404),
    )
    def get(self, request: Request, pk: str) -> Response:
        """The global model, then the newest update of each participant that you may see."""
        return super().get(request, pk)
