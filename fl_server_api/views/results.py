"""What a training has come to: its rounds, metrics and versions; and a stream of what happens."""

import csv
import hashlib
import json
import time
from collections.abc import Iterable, Iterator
from typing import Any

from django.http import HttpResponseBase, StreamingHttpResponse
from django.utils import timezone
from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import OpenApiParameter, extend_schema
from rest_framework.request import Request
from rest_framework.response import Response

from fl_server_ai.services.watching import Look, training_watch
from fl_server_api.auth import caller
from fl_server_api.listing import Pages, filtered, listed, parameters
from fl_server_api.serializers.results import (
    EVENT_OUTPUT,
    RoundOutput,
    TrainingMetricOutput,
    VersionOutput,
    WatchOutput,
)
from fl_server_api.stopping import stop_of
from fl_server_api.views.base import View, answers
from fl_server_core.exceptions import Invalid
from fl_server_core.models import Training
from fl_server_core.selectors import (
    get_visible,
    metrics_visible_to,
    rounds_visible_to,
    trainings_visible_to,
    versions_visible_to,
)

METRIC_FILTERS = {"key": "key", "step": "step", "reporter": "reporter", "identifier": "identifier"}
STREAM_SECONDS = 300.0  # then the client connects anew
SILENCE_SECONDS = 15.0  # after which a comment shows that the line is alive
FORMULA = ("=", "+", "-", "@", "\t", "\r")


def _training(request: Request, pk: str) -> Training:
    return get_visible(trainings_visible_to(caller(request)), pk)


class TrainingRoundsView(View):
    """A training's rounds."""

    @extend_schema(
        operation_id="trainings_rounds",
        parameters=parameters({}),
        responses=answers({200: RoundOutput(many=True)}, 400, 404),
    )
    def get(self, request: Request, pk: str) -> Response:
        """Each round with who was asked, and what became of it."""
        rows = rounds_visible_to(caller(request)).filter(training=_training(request, pk))
        rows = rows.select_related("base_version", "result_version").prefetch_related(
            "tasks__user", "tasks__notifications", "local_models"
        )
        return listed(request, rows, RoundOutput)


class TrainingVersionsView(View):
    """A training's model, version by version."""

    @extend_schema(
        operation_id="trainings_versions",
        parameters=parameters({}, ["number"]),
        responses=answers({200: VersionOutput(many=True)}, 400, 404),
    )
    def get(self, request: Request, pk: str) -> Response:
        """What was uploaded and what each aggregation came to, newest first."""
        training = _training(request, pk)
        rows = versions_visible_to(caller(request)).filter(model=training.model_id)
        return listed(request, rows, VersionOutput, ordering=["number"])


class TrainingMetricsView(View):
    """A training's metrics."""

    @extend_schema(
        operation_id="trainings_metrics",
        parameters=[
            *parameters(METRIC_FILTERS, ["step", "key"]),
            OpenApiParameter(
                "format",
                str,
                enum=["json", "csv"],
                description="Or by the header Accept: text/csv.",
            ),
        ],
        responses=answers(
            {
                (200, "application/json"): TrainingMetricOutput(many=True),
                (200, "text/csv"): OpenApiTypes.STR,
            },
            400,
            404,
        ),
    )
    def get(self, request: Request, pk: str) -> HttpResponseBase:
        """Every number that sites sent, with updates or from tests, and the means over the testers."""
        training = _training(request, pk)
        rows = metrics_visible_to(caller(request)).filter(
            model=training.model_id, value_float__isnull=False
        )
        accepted = "csv" if request.headers.get("Accept", "").startswith("text/csv") else "json"
        wanted = request.query_params.get("format", accepted)
        if wanted == "json":
            return listed(
                request,
                rows,
                TrainingMetricOutput,
                filters=METRIC_FILTERS,
                ordering=["step", "key"],
            )
        if wanted != "csv":
            raise Invalid("format is json or csv", code="BAD_FORMAT")
        rows = filtered(request, rows, METRIC_FILTERS)
        page = Pages().asked(request, rows)
        wanted_rows = rows.iterator(chunk_size=2_000) if page is None else page
        return _csv(wanted_rows, f"metrics-{training.pk}.csv")


class _Line:
    """A file that hands each line on."""

    def write(self, text: str) -> str:
        return text


def _csv(rows: Iterable[Any], name: str) -> HttpResponseBase:
    fields = list(TrainingMetricOutput().fields)

    def lines() -> Iterator[str]:
        writer = csv.writer(_Line())
        yield writer.writerow(fields)
        for metric in rows:
            shown = TrainingMetricOutput(metric).data
            yield writer.writerow([_cell(shown[name]) for name in fields])

    answer = StreamingHttpResponse(lines(), content_type="text/csv; charset=utf-8")
    answer["Content-Disposition"] = f'attachment; filename="{name}"'
    return answer


def _cell(value: Any) -> Any:
    """Sites choose names: none may become a formula in whoever's spreadsheet."""
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value


class TrainingEventsView(View):
    """A stream of what happens."""

    @extend_schema(
        operation_id="trainings_events",
        parameters=[OpenApiParameter("Last-Event-ID", str, location=OpenApiParameter.HEADER)],
        responses=answers({(200, "text/event-stream"): EVENT_OUTPUT}, 404),
    )
    def get(self, request: Request, pk: str) -> HttpResponseBase:
        """Server-sent events: `training` whenever something has changed, `end` when it has ended.

        A stream lasts five minutes at most; browsers connect anew by themselves, with `Last-Event-ID`.
        """
        training = _training(request, pk)
        looks = training_watch(
            training_id=training.pk,
            user=caller(request),
            seconds=STREAM_SECONDS,
            stop=stop_of(request),
        )
        answer = StreamingHttpResponse(
            _events(looks, request.headers.get("Last-Event-ID", "")),
            content_type="text/event-stream",
        )
        answer["Cache-Control"] = "no-store"
        answer["X-Accel-Buffering"] = "no"
        return answer


def _events(looks: Iterable[Look], last: str) -> Iterator[str]:
    yield "retry: 2000\n\n"
    said = time.monotonic()
    for look in looks:
        shown = WatchOutput(look).data
        text = json.dumps(shown)
        digest = _digest(shown)
        if digest != last:
            last = digest
            yield f"id: {digest}\nevent: training\ndata: {text}\n\n"
            said = time.monotonic()
        elif time.monotonic() - said > SILENCE_SECONDS:
            yield f": {timezone.now():%H:%M:%S}\n\n"
            said = time.monotonic()
        if look.ended:
            yield f"event: end\ndata: {json.dumps(shown['state'])}\n\n"


def _digest(shown: dict[str, Any]) -> str:
    """Of what matters: a sentence that says "5 s ago" is no event."""
    blocked = dict(shown["blocked_on"] or {})
    for name in ("text", "eta"):
        blocked.pop(name, None)
    who = [{**one, "last_seen": None} for one in blocked.get("who", [])]
    text = json.dumps({**shown, "blocked_on": {**blocked, "who": who}}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
