"""The sweep: finds every state that nobody works on, and moves it. Any number may run at once."""

import logging
import time
from dataclasses import dataclass
from datetime import timedelta

from django.db.models import Exists, OuterRef, Q
from django.utils import timezone

from fl_server_ai.aggregation import STRATEGIES
from fl_server_ai.dispatch import (
    dispatch_event,
    dispatch_inference,
    dispatch_notifications,
    dispatch_slices,
)
from fl_server_ai.services.quarantine import quarantine_sweep
from fl_server_ai.services.rounds import RUNNING, round_advance, training_fail
from fl_server_core.exceptions import Unavailable
from fl_server_core.killpoints import committing, reached
from fl_server_core.lifecycle import (
    OPEN_PHASES,
    EventState,
    NotificationState,
    RoundPhase,
    TaskKind,
    TrainingState,
)
from fl_server_core.models import IdempotencyKey, Notification, Round, Task, TrainerEvent
from fl_server_core.services import events, inference, slices
from fl_server_core.services.blobs import (
    blobs_delete_doomed,
    blobs_doom_unreferenced,
    files_sweep,
)
from fl_server_core.services.lateness import late_updates_settle
from fl_server_core.services.statistics import statistics_delete_unused
from fl_server_core.services.trainings import training_locked
from fl_server_core.services.uploads import uploads_delete_expired

log = logging.getLogger("fl.server")
HOUSEKEEPING_SECONDS = 3_600
_housekeeping_due = 0.0


@dataclass(frozen=True)
class Sweep:
    """What one sweep found."""

    dispatched: int
    failed: int
    closed: int
    deleted: int


def sweep() -> Sweep:
    """Re-dispatch or end work without a live lease, close overdue rounds, delete what is doomed."""
    reached("sweep:before")
    dispatched, failed = _events()
    _slices()
    _questions()
    closed = _deadlines()
    if Notification.objects.filter(
        state=NotificationState.QUEUED, next_attempt_at__lte=timezone.now()
    ).exists():
        dispatch_notifications()
    late_updates_settle()
    quarantine_sweep()
    deleted = blobs_delete_doomed()
    _housekeeping()
    reached("sweep:after")
    return Sweep(dispatched, failed, closed, deleted)


def _events() -> tuple[int, int]:
    dispatched = failed = 0
    for event in events.events_waiting():
        if not events.event_exhausted(event):
            dispatch_event(event.pk)
            dispatched += 1
        else:
            lost = event.error or "its worker was lost each time (killed, or out of memory)"
            event_give_up(
                event=event, reason=f"WORKER_LOST: {event.type}, {event.attempt} attempts: {lost}"
            )
            failed += 1
    return dispatched, failed


def _slices() -> None:
    slices.slices_settle()
    due = []
    for one in slices.slices_waiting():
        if not events.event_exhausted(one):
            due.append(one.pk)
            continue
        lost = one.error or "its worker was lost each time (killed, or out of memory)"
        said = f"{one.kind} {one.index + 1} of {one.of}, {one.attempt} attempts: {lost}"
        event_give_up(event=one.event, reason=f"WORKER_LOST: {one.event.type}, {said}")
    if due:
        dispatch_slices(due)


def _questions() -> None:
    due, lost = inference.jobs_waiting()
    for job_id in due:
        dispatch_inference(job_id)
    for job in lost:
        said = f"its worker was lost {job.attempt} times (killed, or out of memory)"
        inference.job_fail(job=job, error=Unavailable(said, code="WORKER_LOST"))


def event_give_up(*, event: TrainerEvent, reason: str) -> None:
    """End a piece of work and its training with a reason; nothing happens if it isn't ours to end."""
    with committing("event.give_up"):
        training = training_locked(event.training_id)
        if not events.event_fail(event=event, error=reason):
            return
        slices.slices_drop(event=event)
        if training.state in RUNNING | {TrainingState.PAUSED}:
            round = Round.objects.get(pk=event.round_id)
            training_fail(training, round, reason)


def event_lease_drop(*, event_id: int) -> None:
    """Let another worker have the event at once: its worker is known to be dead."""
    TrainerEvent.objects.filter(pk=event_id, state=EventState.RUNNING).update(
        lease_until=timezone.now()
    )


def _deadlines() -> int:
    asked = Task.objects.filter(round=OuterRef("pk"), kind=TaskKind.TRAIN)
    # Too few could be asked so far; or more may be asked at any time.
    buffered = Q(policy__mode__in=["buffered", "async"])
    unasked = Q(phase__in=list(OPEN_PHASES)) & (~Exists(asked) | buffered)
    overdue = list(
        Round.objects.filter(
            Q(deadline__lte=timezone.now()) | unasked,
            phase__in=[*OPEN_PHASES, RoundPhase.SWAG, RoundPhase.TESTING],
            training__state__in=RUNNING,
            training__aggregation_method__in=list(STRATEGIES),  # else it waits for its plug-in
        ).values_list("training_id", flat=True)
    )
    for training_id in overdue:
        with committing("round.deadline"):
            round_advance(training_id=training_id)
    return len(overdue)


def _housekeeping() -> None:
    """Hourly, and at the start of each process: files without rows, rows without use."""
    global _housekeeping_due
    if time.monotonic() < _housekeeping_due:
        return
    _housekeeping_due = time.monotonic() + HOUSEKEEPING_SECONDS
    day_ago = timezone.now() - timedelta(days=1)
    IdempotencyKey.objects.filter(created_at__lt=day_ago).delete()
    inference.jobs_delete_old()
    uploads_delete_expired()
    statistics_delete_unused()
    blobs_doom_unreferenced()
    removed = files_sweep()
    if removed:
        log.info("housekeeping removed %s files that no row names", removed)
