"""Slices of an event's work: rows that are planned together, claimed one by one, and dropped together."""

from datetime import timedelta

from django.conf import settings
from django.db import transaction
from django.db.models import F, Q
from django.utils import timezone

from fl_server_core.killpoints import committing, reached
from fl_server_core.lifecycle import EventState, TrainingState
from fl_server_core.models import Blob, SliceKind, TrainerEvent, WorkSlice
from fl_server_core.services.blobs import blobs_doom_unreferenced
from fl_server_core.services.events import after_pause, claimable, mine, row_claim

ENDED = (EventState.DONE, EventState.FAILED)


def slices_plan(*, event: TrainerEvent, kind: SliceKind, of: int, plan: str) -> list[WorkSlice]:
    """Write the rows of all slices of a kind. Call it with the training's row locked and the event held."""
    return WorkSlice.objects.bulk_create(
        [WorkSlice(event=event, kind=kind, index=index, of=of, plan=plan) for index in range(of)]
    )


def slice_claim(*, slice_id: int) -> WorkSlice | None:
    """Take the slice for one attempt; None if it is done, taken, waiting, gone, or has failed too often."""
    reached("slice.claim:before")
    if not row_claim(WorkSlice.objects.filter(pk=slice_id)):
        return None
    reached("slice.claim:after")
    related = ("event__training__model", "event__round")
    return WorkSlice.objects.select_related(*related).filter(pk=slice_id).first()


def slice_renew(*, one: WorkSlice) -> bool:
    """Prolong the lease; False if somebody else has the slice by now, or it was dropped."""
    until = timezone.now() + timedelta(seconds=settings.FL_LEASE_SECONDS)
    return bool(WorkSlice.objects.filter(mine(one)).update(lease_until=until))


@committing("slice.finish")
def slice_finish(*, one: WorkSlice, blob: Blob, recipe: str, warnings: list[str]) -> bool:
    """Store the slice's file; False, and nothing is stored, if the slice isn't this attempt's any more."""
    if not WorkSlice.objects.select_for_update().filter(mine(one)).exists():
        return False
    blob.save()
    WorkSlice.objects.filter(mine(one)).update(
        state=EventState.DONE,
        result=blob,
        recipe=recipe,
        warnings=warnings,
        lease_until=None,
        error="",
        finished_at=timezone.now(),
    )
    return True


def slice_release(*, one: WorkSlice, error: str, spent: bool = True) -> bool:
    """Give the slice back after a failed attempt, to be claimed again after a pause; `spent` as of an event."""
    return bool(
        WorkSlice.objects.filter(mine(one)).update(
            state=EventState.PENDING,
            failures=F("failures") + (1 if spent else 0),
            lease_until=after_pause(one.attempt),
            error=error[:4000],
        )
    )


@transaction.atomic
def slice_again(*, one: WorkSlice, error: str) -> None:
    """A finished slice turned out to be useless: it is to be made again, which counts as a failure."""
    WorkSlice.objects.filter(pk=one.pk, attempt=one.attempt, state=EventState.DONE).update(
        state=EventState.PENDING,
        failures=F("failures") + 1,
        result=None,
        lease_until=None,
        finished_at=None,
        error=error[:4000],
    )
    if one.result_id is not None:
        blobs_doom_unreferenced(ids=[one.result_id])


@transaction.atomic
def slices_drop(*, event: TrainerEvent, plan: str | None = None) -> int:
    """Forget the event's slices, of that plan or all, and give their files up. Returns how many there were."""
    of_plan = Q() if plan is None else Q(plan=plan)
    slices = list(WorkSlice.objects.select_for_update().filter(of_plan, event=event))
    blobs = [one.result_id for one in slices if one.result_id is not None]
    WorkSlice.objects.filter(pk__in=[one.pk for one in slices]).delete()
    if blobs:
        blobs_doom_unreferenced(ids=blobs)
    return len(slices)


def slices_unfinished(*, event_id: int) -> bool:
    """Whether anything is left to be made for the event."""
    return WorkSlice.objects.filter(event=event_id).exclude(state=EventState.DONE).exists()


def slices_waiting() -> list[WorkSlice]:
    """What could be claimed now, attempts left or not. A paused training's work waits."""
    return list(
        WorkSlice.objects.filter(claimable())
        .exclude(event__training__state=TrainingState.PAUSED)
        .exclude(event__state__in=ENDED)
        .select_related("event__training__model", "event__round")
        .order_by("pk")
    )


def slices_settle() -> int:
    """Drop the slices of work that has ended, however it did. Returns how many."""
    over = TrainerEvent.objects.filter(state__in=ENDED, slices__isnull=False).distinct()
    return sum(slices_drop(event=event) for event in over)
