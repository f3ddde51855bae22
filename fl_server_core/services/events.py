"""Durable work: claimed by one conditional UPDATE, kept by a lease, fenced by the attempt."""

from datetime import datetime, timedelta

from django.conf import settings
from django.db.models import Case, Exists, F, OuterRef, Q, QuerySet, When
from django.utils import timezone

from fl_server_core.killpoints import reached
from fl_server_core.lifecycle import EventState, TrainingState
from fl_server_core.models import TrainerEvent, WorkSlice

BACK_OFF = (2.0, 10.0, 30.0, 60.0)  # seconds before the second, third, ... attempt


def claimable() -> Q:
    """What nobody works on, or somebody whose lease is over."""
    now = timezone.now()
    return Q(state=EventState.PENDING) & (Q(lease_until=None) | Q(lease_until__lte=now)) | Q(
        state=EventState.RUNNING, lease_until__lte=now
    )


def row_claim(row: QuerySet[TrainerEvent] | QuerySet[WorkSlice]) -> bool:
    """Take one row for one attempt, if it may be taken and has not failed too often.

    One that is still running although its lease is over was lost with its worker: that is a failure.
    """
    lost = Case(When(state=EventState.RUNNING, then=1), default=0)
    return bool(
        row.filter(claimable())
        .annotate(failed=F("failures") + lost)
        .filter(failed__lt=settings.FL_EVENT_ATTEMPTS)
        .update(
            state=EventState.RUNNING,
            attempt=F("attempt") + 1,
            failures=F("failures") + lost,
            lease_until=timezone.now() + timedelta(seconds=settings.FL_LEASE_SECONDS),
        )
    )


def mine(row: TrainerEvent | WorkSlice) -> Q:
    """The row as long as it is this attempt's."""
    return Q(pk=row.pk, attempt=row.attempt, state=EventState.RUNNING)


def event_claim(*, event_id: int) -> TrainerEvent | None:
    """Take the event for one attempt; None if it is done, taken, waiting, or has failed too often."""
    reached("event.claim:before")
    if not row_claim(TrainerEvent.objects.filter(pk=event_id)):
        return None
    reached("event.claim:after")
    return TrainerEvent.objects.select_related("training__model", "round").get(pk=event_id)


def event_renew(*, event: TrainerEvent) -> bool:
    """Prolong the lease; False if somebody else has the event by now."""
    until = timezone.now() + timedelta(seconds=settings.FL_LEASE_SECONDS)
    return bool(TrainerEvent.objects.filter(mine(event)).update(lease_until=until))


def event_held(*, event: TrainerEvent) -> bool:
    """Whether this attempt may still publish. Ask with the training's row locked."""
    return TrainerEvent.objects.select_for_update().filter(mine(event)).exists()


def event_finish(*, event: TrainerEvent) -> bool:
    """Mark the work as done; False (and nothing happens) if it isn't this attempt's any more."""
    return bool(
        TrainerEvent.objects.filter(mine(event)).update(
            state=EventState.DONE, lease_until=None, error="", finished_at=timezone.now()
        )
    )


def event_release(
    *, event: TrainerEvent, error: str, spent: bool = True, pause: bool = True
) -> bool:
    """Give the work back after a failed attempt, to be claimed again after a pause.

    `spent=False`: the work is not to blame (the disk, the database, nothing to do yet), however often.
    """
    return bool(
        TrainerEvent.objects.filter(mine(event)).update(
            state=EventState.PENDING,
            failures=F("failures") + (1 if spent else 0),
            lease_until=after_pause(event.attempt) if pause else None,
            error=error[:4000],
        )
    )


def after_pause(attempt: int) -> datetime:
    """When work may be claimed again that was given back by this attempt."""
    return timezone.now() + timedelta(seconds=BACK_OFF[min(attempt, len(BACK_OFF)) - 1])


def event_wake(*, event_id: int) -> bool:
    """Let work that waits be claimed at once; False if somebody is at it, or it has ended."""
    waits = TrainerEvent.objects.filter(pk=event_id, state=EventState.PENDING)
    return bool(waits.update(lease_until=None))


def event_fail(*, event: TrainerEvent, error: str) -> bool:
    """End the work for good; False if it has ended already or is another attempt's."""
    return bool(
        TrainerEvent.objects.filter(pk=event.pk, attempt=event.attempt)
        .exclude(state__in=[EventState.DONE, EventState.FAILED])
        .update(
            state=EventState.FAILED,
            lease_until=None,
            error=error[:4000],
            finished_at=timezone.now(),
        )
    )


def events_waiting() -> list[TrainerEvent]:
    """What could be claimed now, attempts left or not, oldest first.

    A paused training's work waits, and so does what others make slices for.
    """
    slices = WorkSlice.objects.filter(event=OuterRef("pk")).exclude(state=EventState.DONE)
    return list(
        TrainerEvent.objects.filter(claimable())
        .exclude(training__state=TrainingState.PAUSED)
        .exclude(Exists(slices), state=EventState.PENDING)
        .select_related("training__model", "round")
        .order_by("created_at")
    )


def event_exhausted(event: TrainerEvent | WorkSlice) -> bool:
    """Whether it (or a slice of it) has failed as often as anything may, the attempt of a lost worker included."""
    lost = event.state == EventState.RUNNING
    return event.failures + lost >= settings.FL_EVENT_ATTEMPTS
