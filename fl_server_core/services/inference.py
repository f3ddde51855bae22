"""Inference jobs: like trainer events claimed by one conditional UPDATE and kept by a lease.

Who waits for his answer has been promised nothing: until `job_keep`, commits do not wait for the disk. After a power
cut such a job is as it was some moments before, and is worked on again, or is gone with its asker's connection.
"""

import contextlib
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from django.conf import settings
from django.db.models import F, Q
from django.utils import timezone

from fl_server_core import exceptions
from fl_server_core.commits import unsynced
from fl_server_core.exceptions import DomainError
from fl_server_core.killpoints import committing, reached
from fl_server_core.lifecycle import EventState
from fl_server_core.models import Blob, InferenceJob
from fl_server_core.services.blobs import blobs_doom_unreferenced
from fl_server_core.storage import DurableStorage, weights_storage

HINT_SECONDS = 10  # until the sweep repeats the hint at a job that nobody took
KEPT = timedelta(days=1)
BATCH = 500


@unsynced()
@committing("question.ask")
def job_create(*, data: bytes | None, file: Blob | None, **fields: Any) -> InferenceJob:
    """Store a question; its input is `data`, or `file`, whose row is made with the job's."""
    if file is not None:
        file.save()
    return InferenceJob.objects.create(
        input_bytes=data, input_file=file, lease_until=_in(HINT_SECONDS), **fields
    )


def job_keep(*, job: InferenceJob) -> None:
    """Make the question durable, its input's file included: its asker is about to be told to come back."""
    storage = weights_storage()
    if job.input_file is not None and isinstance(storage, DurableStorage):
        with contextlib.suppress(FileNotFoundError):  # answered meanwhile
            storage.sync(job.input_file.name)
    InferenceJob.objects.filter(pk=job.pk).update(lease_until=F("lease_until"))


def job_claim(*, job_id: int) -> InferenceJob | None:
    """Take the job for one attempt; None if it is done, taken, gone, or was lost too often."""
    reached("question.claim:before")
    with unsynced():
        claimed = InferenceJob.objects.filter(
            Q(state=EventState.PENDING) | _lost(), pk=job_id, attempt__lt=settings.FL_EVENT_ATTEMPTS
        ).update(
            state=EventState.RUNNING,
            attempt=F("attempt") + 1,
            lease_until=_in(settings.FL_LEASE_SECONDS),
        )
    if not claimed:
        return None
    reached("question.claim:after")
    related = ("model__template", "model__preprocessing", "weights", "input_file")
    return InferenceJob.objects.select_related(*related).filter(pk=job_id).first()


def job_renew(*, job: InferenceJob) -> bool:
    """Prolong the lease; False if somebody else has the job by now, or it was deleted."""
    return bool(_mine(job).update(lease_until=_in(settings.FL_LEASE_SECONDS)))


@unsynced()
@committing("question.finish")
def job_finish(
    *, job: InferenceJob, data: bytes | None, file: Blob | None, notes: Sequence[str] = ()
) -> bool:
    """Store the result, unless this attempt has lost the job: then False, and the file stays the caller's."""
    if not _mine(job).exists():
        return False
    if file is not None:
        file.save()
    return _end(job, EventState.DONE, result_bytes=data, result_file=file, notes=list(notes))


@unsynced()
def job_fail(*, job: InferenceJob, error: DomainError) -> bool:
    """End the job with a refusal; False if this attempt has lost it."""
    told = {
        "kind": next(k.__name__ for k in type(error).__mro__ if hasattr(exceptions, k.__name__)),
        "code": error.error_code,
        "detail": error.detail[:4000],
        "data": error.data,
    }
    return _end(job, EventState.FAILED, error=told)


def job_release(*, job: InferenceJob) -> bool:
    """Give the job back after a failure that is not its own; the next sweep hints at it again."""
    return bool(_mine(job).update(state=EventState.PENDING, lease_until=_in(1)))


def job_error(job: InferenceJob) -> DomainError:
    """What a failed job was refused with, as it was raised."""
    told = job.error or {}
    kind = getattr(exceptions, str(told.get("kind")), exceptions.Unusable)
    refusal: DomainError = kind(told.get("detail", ""), code=told.get("code"), **told["data"])
    return refusal


def job_lease_drop(*, job_id: int) -> None:
    """Let another worker have the job at once: its worker is known to be dead."""
    InferenceJob.objects.filter(pk=job_id, state=EventState.RUNNING).update(lease_until=_in(0))


def jobs_waiting() -> tuple[list[int], list[InferenceJob]]:
    """Jobs to hint at (not again for some seconds), and those that were lost too often."""
    due = InferenceJob.objects.filter(
        Q(state=EventState.PENDING, lease_until__lte=timezone.now()) | _lost()
    ).order_by("created_at")[:BATCH]
    found = list(due)
    lost = [job for job in found if job.attempt >= settings.FL_EVENT_ATTEMPTS]
    ids = [job.pk for job in found if job not in lost]
    InferenceJob.objects.filter(pk__in=ids, state=EventState.PENDING).update(
        lease_until=_in(HINT_SECONDS)
    )
    return ids, lost


def jobs_delete_old() -> int:
    """Delete jobs older than a day; the caller dooms what nothing refers to any more."""
    return InferenceJob.objects.filter(created_at__lt=timezone.now() - KEPT).delete()[0]


def _end(job: InferenceJob, state: EventState, **fields: Any) -> bool:
    ended = _mine(job).update(
        state=state,
        lease_until=None,
        finished_at=timezone.now(),
        input_bytes=None,
        input_file=None,
        **fields,
    )
    if ended and job.input_file_id:
        blobs_doom_unreferenced(ids=[job.input_file_id])
    return bool(ended)


def _mine(job: InferenceJob) -> Any:
    return InferenceJob.objects.filter(
        pk=job.pk, attempt=job.attempt, state__in=[EventState.PENDING, EventState.RUNNING]
    )


def _lost() -> Q:
    return Q(state=EventState.RUNNING, lease_until__lte=timezone.now())


def _in(seconds: float) -> Any:
    return timezone.now() + timedelta(seconds=seconds)
