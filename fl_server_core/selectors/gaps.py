"""Rounds that got fewer updates than they asked for, and why each missing one is missing."""

import uuid
from collections import defaultdict
from dataclasses import dataclass

from django.db.models import Count, Exists, OuterRef, Q, QuerySet

from fl_server_core.lifecycle import (
    OPEN_PHASES,
    RoundPhase,
    TaskKind,
    TaskState,
    TrainingState,
)
from fl_server_core.models import Round, Task, Training, User
from fl_server_core.selectors.parts import failure_code
from fl_server_core.selectors.visibility import users_visible_to

# Codes of parts that a round did not wait for: it had all it wanted; an older update came in its place;
# a later round asks for the same.
ROUND_FULL, LATE_COUNTS, SUPERSEDED = "ROUND_FULL", "LATE_COUNTS", "SUPERSEDED"
# Of an update that was in when its round was skipped.
ROUND_SKIPPED = "ROUND_SKIPPED"
NOT_MISSED = Q(failure__startswith=f"{ROUND_FULL}:") | Q(failure__startswith=f"{LATE_COUNTS}:")
NOT_MISSED |= Q(failure__startswith=f"{SUPERSEDED}:")
# A round that was passed over for want of updates; an empty draw is none: that is how it was to be.
PASSED_OVER = Q(
    phase__in=[RoundPhase.SKIPPED, RoundPhase.TESTING, RoundPhase.DONE],
    reason__startswith="NOT_ENOUGH_UPDATES:",
)
# Where parts outlive their rounds, an open one is not missing either.
NOT_MISSED |= Q(state=TaskState.OPEN)
OUTCOMES = ("completed", "completed_with_gaps", "cancelled", "failed")
ENDS = {TrainingState.CANCELLED: "cancelled", TrainingState.ERROR: "failed"}
ROUNDS_TOLD, MISSING_TOLD = 100, 20


@dataclass(frozen=True)
class Missing:
    """A participant whose update is not in. `name` is empty where one may not know it."""

    user: uuid.UUID
    name: str
    state: str
    code: str


@dataclass(frozen=True)
class Gap:
    """A round that went on, was skipped, or failed with fewer updates than it wanted; 20 are named at most."""

    round: int
    received: int
    asked: int
    missing: list[Missing]

    @property
    def text(self) -> str:
        """Like "round 2: 1 of 2 sites (bob failed: TRAIN_EXCEPTION)"."""
        if not self.asked:
            return f"round {self.round}: skipped, nobody could be asked"
        who = [f"{m.name or m.user} {m.state}: {m.code}".rstrip(": ") for m in self.missing]
        if more := self.asked - self.received - len(who):
            who.append(f"and {more} more")
        named = f" ({', '.join(who)})" if who else ", skipped"
        return f"round {self.round}: {self.received} of {self.asked} sites{named}"


def with_gaps(trainings: QuerySet[Training]) -> QuerySet[Training]:
    """Say of each whether it has any, so that `outcome` needn't ask."""
    missing = _missing().filter(round__training=OuterRef("pk"))
    skipped = Round.objects.filter(PASSED_OVER, training=OuterRef("pk"))
    return trainings.annotate(_has_gaps=Exists(missing) | Exists(skipped))


def _missing() -> QuerySet[Task]:
    asked = Task.objects.filter(kind=TaskKind.TRAIN).exclude(state=TaskState.DONE)
    asked = asked.exclude(NOT_MISSED)
    return asked.exclude(round__phase__in=OPEN_PHASES)


def outcome(training: Training) -> str | None:
    """How a training ended, one of `OUTCOMES`; None while it has not."""
    if training.state != TrainingState.COMPLETED:
        return ENDS.get(TrainingState(training.state))
    gaps = getattr(training, "_has_gaps", None)
    if gaps is None:
        missing = _missing().filter(round__training=training)
        gaps = missing.exists() or training.rounds.filter(PASSED_OVER).exists()
    return "completed_with_gaps" if gaps else "completed"


def gaps(*, training: Training, visible_to: User) -> list[Gap]:
    """The newest 100 of them, oldest first; rounds that still collect are none yet.

    Who was not waited for because the round had all it wanted is not missing.
    """
    counts = Task.objects.filter(kind=TaskKind.TRAIN).exclude(NOT_MISSED)
    asked = Q(tasks__in=counts)
    rounds = list(
        training.rounds.exclude(phase__in=OPEN_PHASES)
        .annotate(
            asked=Count("tasks", filter=asked),
            received=Count("tasks", filter=asked & Q(tasks__state=TaskState.DONE)),
            missing=Count("tasks", filter=asked & ~Q(tasks__state=TaskState.DONE)),
        )
        .filter(Q(missing__gt=0) | PASSED_OVER)
        .order_by("-number")[:ROUNDS_TOLD]
    )
    tasks: dict[int, list[Task]] = defaultdict(list)
    absent = Task.objects.filter(round__in=[r.pk for r in rounds], kind=TaskKind.TRAIN)
    absent = absent.exclude(state=TaskState.DONE).exclude(NOT_MISSED)
    for task in absent.order_by("created_at", "id"):
        if len(tasks[task.round_id]) < MISSING_TOLD:
            tasks[task.round_id].append(task)
    ids = {task.user_id for found in tasks.values() for task in found}
    names = dict(users_visible_to(visible_to).filter(pk__in=ids).values_list("pk", "username"))
    return [
        Gap(
            round=round.number,
            received=round.received,
            asked=round.asked,
            missing=[
                Missing(t.user_id, names.get(t.user_id, ""), t.state, failure_code(t.failure))
                for t in tasks[round.pk]
            ],
        )
        for round in reversed(rounds)
    ]
