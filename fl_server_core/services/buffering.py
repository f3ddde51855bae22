"""Asynchronous modes: who is asked while a buffer fills. Callers hold the training's row lock.

A part is asked for against the current version, and outlives its round: the round closes with the K-th update,
whichever version it was trained from. One update of each participant counts in a round.
"""

from datetime import timedelta

from django.db.models import Q
from django.utils import timezone

from fl_server_core.lifecycle import RoundPhase, TaskKind, TaskState, move, move_all
from fl_server_core.models import LocalModel, Round, Task, User
from fl_server_core.models.notifications import NotificationType
from fl_server_core.selectors.gaps import SUPERSEDED
from fl_server_core.services.asking import eligible_now
from fl_server_core.services.heartbeats import phase_end
from fl_server_core.services.lateness import COUNTED, busy_with, staleness_of
from fl_server_core.services.round_policy import RoundPolicy, policy_of
from fl_server_core.services.rounds import tasks_ask
from fl_server_core.services.sampling import uniform


def buffer_ask(round: Round) -> list[Task]:
    """Ask those who are idle, as many as may train at a time (`clients_per_round`). Returns the new parts.

    Asked again in the same round is nobody. Who never fetched an older part gets the current version instead.
    """
    policy, training = policy_of(round.policy), round.training
    _retire(round, policy)
    busy = busy_with(training)
    seen = set(round.tasks.filter(kind=TaskKind.TRAIN).values_list("user_id", flat=True))
    counted = LocalModel.objects.filter(round=round, state__in=COUNTED)
    seen |= set(counted.values_list("owner_id", flat=True))
    members, there = eligible_now(round)
    idle = [user for user in there if user.pk not in seen and str(user.pk) not in busy]
    free = (policy.clients_per_round or len(members)) - len(busy)
    idle.sort(key=lambda user: uniform(training.seed, round.number, str(user.pk)))
    users = sorted(idle[: max(0, free)], key=lambda user: user.pk)
    if round.phase == RoundPhase.NOTIFYING and not any(user.message_endpoint for user in users):
        move(round, RoundPhase.COLLECTING)
    return _ask(round, users) if users else []


def _ask(round: Round, users: list[User]) -> list[Task]:
    type = NotificationType.UPDATE_ROUND_START
    tasks = tasks_ask(round, users, TaskKind.TRAIN, round.number, type)
    chosen = {user.pk for user in users}
    return [task for task in tasks if task.user_id in chosen]


def _retire(round: Round, policy: RoundPolicy) -> None:
    """End older parts: those too stale to count, too long open, or not begun yet."""
    now = timezone.now()
    older = Task.objects.filter(
        round__training=round.training, kind=TaskKind.TRAIN, state=TaskState.OPEN
    ).exclude(round=round)
    for task in older.select_related("round__base_version"):
        if staleness_of(task.round.base_version, round.base_version) > policy.max_staleness:
            said = f"TOO_STALE: more than {policy.max_staleness} versions old"
            move(task, TaskState.EXPIRED, failure=said, finished_at=now)
    unbegun = Q(fetched_at=None, user__message_endpoint="")
    move_all(
        older.filter(unbegun),
        TaskState.CANCELLED,
        failure=f"{SUPERSEDED}: round {round.number} asks for the same with a newer model",
        finished_at=now,
    )
    parts_expire(round, policy)


def parts_expire(round: Round, policy: RoundPolicy) -> None:
    """End the parts that were open for as long as a round may last; what they send still counts.

    Who reports progress has longer, and so has everybody in a round that was given more time.
    """
    now, span = timezone.now(), timedelta(seconds=policy.seconds)
    given = round.deadline if round.deadline and round.deadline > round.started_at + span else now
    parts = Task.objects.filter(
        round__training=round.training, kind=TaskKind.TRAIN, state=TaskState.OPEN
    )

    def over(part: Task) -> bool:
        begun = part.not_before or part.created_at
        end = phase_end(
            deadline=begun + span,
            asked_at=begun,
            heartbeats=[part.progress_at] if part.progress_at else [],
            extends=policy.progress_extends,
        )
        return max(end, given) <= now

    move_all(
        [part for part in parts if over(part)],
        TaskState.EXPIRED,
        failure="DEADLINE: nothing arrived in time",
        finished_at=timezone.now(),
    )
