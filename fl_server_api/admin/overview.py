"""What a training's page shows of the present: who is missing, how the metrics go, the last rounds."""

import json
from collections import defaultdict
from typing import Any

from django.db.models import Count, Q
from django.utils import timezone
from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString

from fl_server_ai.aggregation.options import limits_text
from fl_server_ai.services.training_options import strategy_schema
from fl_server_api.admin.base import bytes_text, list_link, row_link
from fl_server_api.admin.html import sparkline, table
from fl_server_core.exceptions import Unavailable
from fl_server_core.lifecycle import RoundPhase, TaskKind, TaskState
from fl_server_core.models import (
    LocalModel,
    Metric,
    ModelVersion,
    Notification,
    Participant,
    Round,
    Task,
    TrainerEvent,
    Training,
)
from fl_server_core.services.rounds import current_round

PEOPLE_SHOWN = 200
POINTS_READ = 600
CURVES_SHOWN = 6
ROUNDS_SHOWN = 10
MISSING = "missing"


def links(training: Training) -> SafeString:
    """Lists that show only what belongs to this training."""
    key = {"training__id__exact": training.pk}
    pieces = [
        list_link(Round, "rounds", **key),
        list_link(ModelVersion, "versions", model__id__exact=training.model_id),
        list_link(Participant, "participants (remove them there)", **key),
        list_link(LocalModel, "updates", **key),
        list_link(Metric, "metrics", model__id__exact=training.model_id),
        list_link(TrainerEvent, "work", **key),
        list_link(Notification, "messages", **key),
    ]
    return format_html_join(" · ", "{}", ((piece,) for piece in pieces))


def _asked_now(round: Round) -> TaskKind:
    return TaskKind.EVALUATE if round.phase == RoundPhase.TESTING else TaskKind.TRAIN


def current(training: Training) -> str | SafeString:
    """One line about the newest round."""
    round = current_round(training)
    if round is None:
        return "not started"
    kind = _asked_now(round)
    states = list(round.tasks.filter(kind=kind).values_list("state", flat=True))
    what = "tested" if kind == TaskKind.EVALUATE else "sent an update"
    text = f"{round.phase}; {states.count(TaskState.DONE)} of {len(states)} {what}"
    if round.deadline:
        text += f"; until {timezone.localtime(round.deadline):%Y-%m-%d %H:%M %Z}"
    return format_html("{}: {} {}", row_link(round, f"round {round.number}"), text, round.reason)


def participants(training: Training) -> str | SafeString:
    """Everybody's part in the current round."""
    round = current_round(training)
    tasks: dict[Any, Task] = {}
    updates: dict[Any, LocalModel] = {}
    if round is not None:
        tasks = {task.user_id: task for task in round.tasks.filter(kind=_asked_now(round))}
        updates = {update.owner_id: update for update in round.local_models.all()}
    members = list(
        training.memberships.select_related("user").order_by("removed_at", "user__username")[
            : PEOPLE_SHOWN + 1
        ]
    )
    if not members:
        return "nobody yet"
    rows = [
        _person(member, tasks.get(member.user_id), updates.get(member.user_id))
        for member in members[:PEOPLE_SHOWN]
    ]
    heads = ("participant", "this round", "samples", "size", "heard from", "in since", "removed")
    shown = table(heads, rows)
    if len(members) > PEOPLE_SHOWN:
        more = list_link(Participant, "everybody", training__id__exact=training.pk)
        return format_html("{}<p>The first {} only: {}</p>", shown, PEOPLE_SHOWN, more)
    return shown


def _person(
    member: Participant, task: Task | None, update: LocalModel | None
) -> tuple[object, ...]:
    return (
        row_link(member.user, member.user.username),
        _part(task),
        update.sample_size if update else None,
        bytes_text(update.size) if update else None,
        member.user.last_seen_at,
        member.joined_at,
        member.removed_at,
    )


def _part(task: Task | None) -> str | SafeString:
    if task is None:
        return "not asked"
    if task.state == TaskState.DONE:
        return row_link(task, "sent" if task.kind != TaskKind.EVALUATE else "tested")
    if task.state == TaskState.OPEN:
        fetched = "at work" if task.fetched_at else "task not fetched"
        return format_html("<strong>{}</strong> ({})", row_link(task, MISSING), fetched)
    return format_html("{}: {}", row_link(task, task.state), task.failure[:200] or "-")


def method_options(training: Training) -> str | SafeString:
    """What the training's `options` may say of its strategy, beside what every training has."""
    try:
        described = strategy_schema(training.aggregation_method)["properties"]
    except Unavailable as error:
        return error.detail
    rows = (
        (name, _kind(entry), json.dumps(entry.get("default")), entry.get("description", ""))
        for name, entry in described.items()
    )
    return table(("option", "type", "default", "meaning"), rows) if described else "none"


def _kind(entry: dict[str, Any]) -> str:
    kinds = [entry["type"]] if isinstance(entry["type"], str) else entry["type"]
    return ", ".join([" or ".join(kinds), *limits_text(entry)])


def curves(training: Training) -> str | SafeString:
    """The aggregated values of the newest steps, one line a metric."""
    points: dict[str, list[tuple[int, float]]] = defaultdict(list)
    newest = (
        Metric.objects.filter(
            model=training.model_id,
            local_model=None,
            reporter=None,
            identifier=Metric.AGGREGATED,
            value_float__isnull=False,
        )
        .order_by("-step", "key")
        .values_list("key", "step", "value_float")[:POINTS_READ]
    )
    for key, step, value in newest:
        if value is not None:
            points[key].append((step, value))
    if not points:
        off = training.options.get("skip_model_tests")
        return "no metrics: model tests are off (skip_model_tests)" if off else "no metrics yet"
    rows = []
    for key, found in sorted(points.items())[:CURVES_SHOWN]:
        step, value = found[0]
        label = f"{key} from step {found[-1][0]} to {step}"
        rows.append((key, sparkline(found[::-1], label), f"{value:.4g}", f"step {step}"))
    return table(("metric", "course", "newest", "at"), rows)


def rounds(training: Training) -> str | SafeString:
    """The newest rounds with their participation."""
    asked = Q(tasks__kind=TaskKind.TRAIN)
    newest = list(
        training.rounds.select_related("result_version")
        .annotate(
            asked=Count("tasks", filter=asked),
            sent=Count("tasks", filter=asked & Q(tasks__state=TaskState.DONE)),
        )
        .order_by("-number")[:ROUNDS_SHOWN]
    )
    if not newest:
        return "none yet"
    rows = [
        (
            row_link(round, round.number),
            round.phase,
            f"{round.sent} of {round.asked}",
            round.started_at,
            round.finished_at,
            row_link(round.result_version, "version")
            if round.result_version is None
            else row_link(round.result_version, f"version {round.result_version.number}"),
            round.reason or "-",
        )
        for round in newest
    ]
    return table(("round", "phase", "updates", "started", "finished", "result", "reason"), rows)
