"""What the server offers, and whether it is well."""

from typing import Any

from django.db import DatabaseError, connection
from django.db.migrations.executor import MigrationExecutor
from django.http import HttpRequest, JsonResponse
from drf_spectacular.utils import extend_schema, inline_serializer
from rest_framework import serializers
from rest_framework.permissions import AllowAny
from rest_framework.request import Request
from rest_framework.response import Response

from fl_server_ai.aggregation import STRATEGIES
from fl_server_ai.services.training_options import strategy_schema
from fl_server_api.serializers.trainings import StrategyOutput
from fl_server_api.views.base import View, answers
from fl_server_core.storage import staging_path

INDEX = {
    "schema": "schema/",
    "swagger-ui": "schema/swagger-ui/",
    "redoc": "schema/redoc/",
    "users": "users/",
    "models": "models/",
    "trainings": "trainings/",
    "tasks": "tasks/",
    "aggregators": "aggregators/",
    "uncertainty-methods": "uncertainty-methods/",
}


class IndexView(View):
    """Where to begin."""

    permission_classes = [AllowAny]

    @extend_schema(
        operation_id="index",
        responses=answers(
            {200: inline_serializer("Index", {name: serializers.URLField() for name in INDEX})}
        ),
    )
    def get(self, request: Request) -> Response:
        """The addresses of what there is; those of the description are open to everybody."""
        return Response(
            {name: request.build_absolute_uri(request.path + at) for name, at in INDEX.items()}
        )


class AggregatorsView(View):
    """The strategies."""

    @extend_schema(
        operation_id="aggregators_list", responses=answers({200: StrategyOutput(many=True)})
    )
    def get(self, request: Request) -> Response:
        """Every strategy that a training may name, with the schema of its options."""
        return Response([_described(name) for name in STRATEGIES])


def _described(name: str) -> dict[str, Any]:
    kind = STRATEGIES[name]
    described = strategy_schema(name)
    return {
        "name": name,
        "paper": kind.paper,
        "options_schema": described,
        "takes": kind.takes,
        "needs_num_steps": kind.needs_steps,
        "extras": [
            {"name": extra.name, "per_tensor": extra.per_tensor, "required": extra.required}
            for extra in kind().extras()
        ],
        "defaults": {
            option: entry["default"]
            for option, entry in described["properties"].items()
            if "default" in entry
        },
    }


def livez(request: HttpRequest) -> JsonResponse:
    """The process answers."""
    return JsonResponse({"status": "ok"})


def readyz(request: HttpRequest) -> JsonResponse:
    """The process can work: database, migrations and storage are in order."""
    checks = {"database": _database(), "storage": _storage()}
    well = all(said == "ok" for said in checks.values())
    return JsonResponse(
        {"status": "ok" if well else "failing", **checks}, status=200 if well else 503
    )


def _database() -> str:
    try:
        executor = MigrationExecutor(connection)
        if executor.migration_plan(executor.loader.graph.leaf_nodes()):
            return "migrations are missing: run manage.py migrate"
    except DatabaseError:
        return "the database does not answer"
    return "ok"


def _storage() -> str:
    path = staging_path(".probe")
    try:
        path.write_bytes(b"ok")
    except OSError:
        return "the staging folder can't be written"
    finally:
        path.unlink(missing_ok=True)
    return "ok"
