"""Steering a training: pause, resume, cancel, retry, and more time for a round.

Each is legal or an `IllegalMove` with the state. Asked for what is so already, it changes nothing and is fine.
Clients learn of it at their next poll or progress report; polls that wait wake up.
"""

from datetime import datetime, timedelta

from django.utils import timezone

from fl_server_ai.dispatch import dispatch_event, dispatch_notifications
from fl_server_ai.notifications import wakeups
from fl_server_ai.services.rounds import (
    MODEL_TEST_FINISHED,
    RUNNING,
    SWAG_ROUND_FINISHED,
    UPDATES_ARRIVED,
    round_advance,
)
from fl_server_core.exceptions import Conflict, IllegalMove, Invalid
from fl_server_core.killpoints import committing
from fl_server_core.lifecycle import (
    EventState,
    RoundPhase,
    TaskKind,
    TrainingState,
    move,
    move_all,
)
from fl_server_core.models import Round, SwagMoments, TrainerEvent, Training, User
from fl_server_core.services.initial_weights import initial_retry
from fl_server_core.services.round_policy import policy_of
from fl_server_core.services.rounds import (
    current_round,
    parts_shift,
    round_end,
    tasks_cancel,
    tasks_reopen,
)
from fl_server_core.services.trainings import may_steer, participants_active, training_locked

LONGEST_EXTENSION = timedelta(days=366)
WORK_PHASES = {
    SWAG_ROUND_FINISHED: RoundPhase.SWAG,
    MODEL_TEST_FINISHED: RoundPhase.TESTING,
    UPDATES_ARRIVED: RoundPhase.COLLECTING,
}
ENDED = frozenset({RoundPhase.DONE, RoundPhase.SKIPPED, RoundPhase.FAILED})
ASKED = {
    RoundPhase.COLLECTING: TaskKind.TRAIN,
    RoundPhase.SWAG: TaskKind.SWAG,
    RoundPhase.TESTING: TaskKind.EVALUATE,
}


@committing("training.pause")
def training_pause(*, training: Training, user: User) -> Training:
    """Ask nobody and begin no work until `training_resume`; deadlines stand still.

    Answers that arrive are kept. A worker that is at it publishes; what follows waits.
    """
    training = _steered(training, user)
    if training.state == TrainingState.PAUSED:
        return training
    if training.state not in RUNNING:
        raise _illegal(training, "paused")
    round = current_round(training)
    if round is not None and round.deadline is not None:
        end = round_end(round, ASKED.get(RoundPhase(round.phase), TaskKind.TRAIN)) or round.deadline
        left = (end - timezone.now()).total_seconds()
        Round.objects.filter(pk=round.pk).update(deadline=None, remaining=max(0.0, left))
    _move(training, TrainingState.PAUSED, user)
    return training


@committing("training.resume")
def training_resume(*, training: Training, user: User) -> Training:
    """Go on where the pause began, with what has arrived since and the time that was left."""
    training = _steered(training, user)
    if training.state in RUNNING:
        return training
    if training.state != TrainingState.PAUSED:
        raise _illegal(training, "resumed")
    round = current_round(training)
    if round is None:
        raise _illegal(training, "resumed")
    if training.steered_at is not None:
        parts_shift(training=training, by=timezone.now() - training.steered_at)
    _move(training, _running(round.phase), user)
    if round.remaining is not None:
        deadline = timezone.now() + timedelta(seconds=round.remaining)
        Round.objects.filter(pk=round.pk).update(deadline=deadline, remaining=None)
    due = TrainerEvent.objects.filter(training=training, state=EventState.PENDING)
    due.update(lease_until=None)
    for event_id in due.values_list("pk", flat=True):
        dispatch_event(event_id)
    round_advance(training_id=training.pk)
    return training


@committing("training.cancel")
def training_cancel(*, training: Training, user: User) -> Training:
    """End a training for good. What is being worked on is thrown away; published versions stay."""
    training = _steered(training, user)
    if training.state == TrainingState.CANCELLED:
        return training
    if training.state not in RUNNING | {TrainingState.INITIAL, TrainingState.PAUSED}:
        raise _illegal(training, "cancelled")
    now = timezone.now()
    reason = f"CANCELLED: by {'its actor' if user.pk == training.actor_id else 'an admin'}"
    round = current_round(training)
    if round is not None and round.phase not in ENDED:
        move(
            round, RoundPhase.FAILED, reason=reason, finished_at=now, deadline=None, remaining=None
        )
    work = TrainerEvent.objects.filter(
        training=training, state__in=[EventState.PENDING, EventState.RUNNING]
    )
    move_all(work, EventState.FAILED, error=reason, lease_until=None, finished_at=now)
    tasks_cancel(training_id=training.pk, why=reason)
    _move(training, TrainingState.CANCELLED, user, reason=reason, finished_at=now)
    return training


@committing("training.retry")
def training_retry(*, training: Training, user: User) -> Training:
    """Take a training out of ERROR, at the step that failed.

    Work that was given up is done again. A round that got too few answers asks those again who gave none
    and are in, with a new deadline; what was accepted stays, and counts once. `Conflict` (STILL_FAILING) if
    it would fail again at once.
    """
    training = _steered(training, user)
    if training.state in RUNNING:
        return training
    round = current_round(training)
    if training.state != TrainingState.ERROR or round is None:
        raise _illegal(training, "retried")
    round.training = training
    work = round.events.filter(state=EventState.FAILED).order_by("pk").last()
    phase = (
        _failed_at(round)
        if work is None
        else WORK_PHASES.get(work.type.partition(":")[0], RoundPhase.AGGREGATING)
    )
    if round.phase == RoundPhase.FAILED:
        move(round, phase, reason="", finished_at=None)
    _move(training, _running(phase), user, reason="", finished_at=None)
    if work is not None:
        move(work, EventState.PENDING, failures=0, lease_until=None, error="", finished_at=None)
        dispatch_event(work.pk)
    if phase in ASKED and (work is None or phase == RoundPhase.COLLECTING):
        deadline = timezone.now() + timedelta(seconds=policy_of(round.policy).seconds)
        Round.objects.filter(pk=round.pk).update(deadline=deadline, extensions=0)
        if phase == RoundPhase.COLLECTING and training.model.awaits_weights:
            initial_retry(round)
        else:
            tasks_reopen(round=round, kind=ASKED[phase])
        dispatch_notifications()
    round_advance(training_id=training.pk)
    training.refresh_from_db()
    if training.state == TrainingState.ERROR:
        raise Conflict(
            f"it would fail again at once: {training.reason}. Let sites take part again first: PUT "
            "trainings/<id>/clients/",
            code="STILL_FAILING",
            state=training.state,
        )
    return training


@committing("round.extend")
def round_extend(
    *,
    training: Training,
    user: User,
    deadline: datetime | None = None,
    seconds: float | None = None,
) -> Round:
    """Give the current round (or test) time until `deadline`, or for `seconds` from now. Never less than it has.

    Paused, it is the time that will be left after the resume.
    """
    training = _steered(training, user)
    round = current_round(training)
    paused = training.state == TrainingState.PAUSED
    if training.state not in RUNNING and not paused:
        raise _illegal(training, "given more time")
    now = timezone.now()
    wanted = now + timedelta(seconds=seconds) if seconds is not None else deadline
    if wanted is None or (seconds is not None) == (deadline is not None):
        raise Invalid("give either deadline or seconds", code="FIELD_REQUIRED")
    if round is None or (round.remaining if paused else round.deadline) is None:
        raise Conflict(
            "no site is waited for now; there is no deadline to extend",
            code="NO_DEADLINE",
            state=training.state,
        )
    until = now + timedelta(seconds=round.remaining or 0) if paused else round.deadline
    if until is None or wanted < until:
        raise Invalid("that is earlier than the present deadline", code="NOT_LATER")
    if wanted > now + LONGEST_EXTENSION:
        raise Invalid("a deadline is at most a year away", code="TOO_LATE")
    if paused:
        round.remaining = (wanted - now).total_seconds()
    else:
        round.deadline = wanted
    round.save(update_fields=["remaining", "deadline"])
    return round


def _steered(training: Training, user: User) -> Training:
    may_steer(training, user)
    return training_locked(training.pk)


def _illegal(training: Training, what: str) -> IllegalMove:
    return IllegalMove(
        f"training {training.pk} is {training.get_state_display()}; it can't be {what}",
        state=training.state,
    )


def _move(training: Training, to: TrainingState, user: User, **fields: object) -> None:
    now = timezone.now()
    move(training, to, steered_at=now, steered_by=user, last_update=now, **fields)
    wakeups.publish([str(client.pk) for client in participants_active(training)])


def _running(phase: str) -> TrainingState:
    return TrainingState.SWAG_ROUND if phase == RoundPhase.SWAG else TrainingState.ONGOING


def _failed_at(round: Round) -> RoundPhase:
    """Where a round failed that no work was given up in: too few answers to what was asked last."""
    if round.result_version_id is None:
        return RoundPhase.COLLECTING
    if not SwagMoments.objects.filter(round=round, owner=None).exists() and (
        round.tasks.filter(kind=TaskKind.SWAG).exists()
    ):
        return RoundPhase.SWAG
    return RoundPhase.TESTING
