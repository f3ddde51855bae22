"""Taking in updates and metrics: read, check, make durable, commit, and only then acknowledge."""

import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from django.conf import settings

from fl_server_ai.aggregation import UpdateMeta
from fl_server_ai.received.form import Form
from fl_server_ai.services.intake import published, update_received
from fl_server_ai.services.places import Places
from fl_server_ai.services.rounds import round_advance
from fl_server_ai.services.training_options import checks_updates, wanted_of
from fl_server_core.connections import connection_release
from fl_server_core.exceptions import Conflict, NotFound, NotPermitted, Unavailable, Unusable
from fl_server_core.killpoints import committing, reached
from fl_server_core.lifecycle import TaskKind, UpdateState
from fl_server_core.models import Blob, GlobalModel, LocalModel, Task, Training, Upload, User
from fl_server_core.selectors import get_visible, models_visible_to
from fl_server_core.services import rounds
from fl_server_core.services.blobs import blob_discard
from fl_server_core.services.metrics import (
    Value,
    metric_names_check,
    metrics_record,
    metrics_room_check,
    metrics_size,
)
from fl_server_core.services.quotas import storage_check
from fl_server_core.services.round_policy import policy_of
from fl_server_core.services.trainings import training_locked
from fl_server_core.services.uploads import upload_taken, upload_used

AT_ONCE = 4  # updates that one process takes in at a time
_turns = threading.Semaphore(AT_ONCE)
# Updates that are here already, each with a thread that downloads need too: those that wait, and those at work.
NAMED = Places(lambda: max(1, settings.FL_TRANSFER_THREADS // 2))
RETRY_SECONDS = 5


@dataclass(frozen=True)
class Receipt:
    """What a client learns about its update: how many the round has, and how many it waits for."""

    update: LocalModel
    created: bool
    received: int
    needed: int
    deadline: datetime | None


def update_precheck(*, model_id: uuid.UUID | str, user: User) -> Training:
    """The training that an update of this model belongs to, or a refusal before the body is read."""
    model = get_visible(models_visible_to(user), model_id)
    training = Training.objects.filter(model=model).first()
    if training is None:
        raise NotFound(f"no training uses model {model.pk}", code="NO_TRAINING")
    rounds.membership_check(training=training, user=user)
    return training


def update_submit(
    *,
    model_id: uuid.UUID | str,
    owner: User,
    round: int,
    sample_size: int,
    file: Path,
    sha256: str | None,
    metrics: dict[str, Value],
    num_steps: int | None = None,
    base_version: int | None = None,
    announced: str = "",
) -> Receipt:
    """Store one client's update. Once this returns, a power cut doesn't lose it.

    `announced` is the digest that the client gave beside its file, if it did: another one than `sha256` is
    `Unusable` (DIGEST_MISMATCH). What can be refused without the file is refused before it is read.

    The same update again gets the same receipt with `created=False`, however late. Two simultaneous
    last updates are put in order by the training's row lock, and one of them closes the round.
    """
    training = update_precheck(model_id=model_id, user=owner)
    metric_names_check(metrics)
    metrics_room_check(metrics)
    rounds.update_expected(training=training, owner=owner, number=round)
    rounds.sample_size_check(sample_size)
    reached("upload.staged")
    wanted = wanted_of(training)
    if num_steps is None and wanted.strategy.needs_steps:
        raise Unusable(
            f"{training.aggregation_method} needs num_steps, the optimiser steps that were made: a "
            "field of the form, and of the SDK's FitResult",
            code="NUM_STEPS_MISSING",
        )
    task = _task(training, owner, round)
    _base(training, task, base_version)
    if announced and sha256 != announced.lower():
        raise Unusable(
            f"the file has SHA-256 {sha256}, announced was {announced}; it changed on the way: send it again",
            code="DIGEST_MISMATCH",
        )

    def base(form: Form) -> Blob:
        said = base_version if form.base_version is None else form.base_version
        return _base(training, task, said)

    with (
        _turn(),
        update_received(file, sha256=sha256, training=training, wanted=wanted, base=base) as (
            received,
            form,
        ),
    ):
        meta = UpdateMeta(str(owner.pk), sample_size, num_steps, received.numbers)
        if refusal := wanted.strategy.admit(meta):
            raise Unusable(refusal.reason, code="EXTRA_RANGE")
        if form.kind in ("subset", "sparse") and training.options.get("daisy_chain_period"):
            raise Unusable(
                "in a daisy chain the next site goes on with what you send; send it whole",
                code="PARTIAL_NOT_TAKEN",
            )
        stored: list[Blob] = []
        try:
            for one in received.files:
                stored.append(published(one))  # noqa: PERF401 - what is stored is known if one fails
            blobs = iter(stored[1:])
            with committing("update.accept"):
                training = training_locked(training.pk)
                update, created = rounds.update_accept(
                    training=training,
                    owner=owner,
                    number=round,
                    sample_size=sample_size,
                    blob=stored[0],
                    metrics=metrics,
                    beside=rounds.Beside(
                        digest=received.identity(num_steps),
                        num_steps=num_steps,
                        base_version=base_version
                        if form.base_version is None
                        else form.base_version,
                        numbers=received.numbers,
                        extras=next(blobs) if received.extras else None,
                        tensors=received.tensors,
                        mask=next(blobs) if received.mask else None,
                    ),
                    checked=not checks_updates(training),
                )
                receipt = _receipt(update, created)
                if created or update.state == UpdateState.REFUSED:  # which may end a part again
                    round_advance(training_id=training.pk)
        except BaseException:
            _discard(stored)
            raise
    if not created:
        _discard(stored)
    return receipt


@contextmanager
def _turn() -> Iterator[None]:
    """One of the few whose update is read and stored just now. Hundreds come at once, and each locks the training."""
    if not _turns.acquire(blocking=False):
        connection_release()
        _turns.acquire()
    try:
        yield
    finally:
        _turns.release()


def _discard(blobs: list[Blob]) -> None:
    for blob in blobs:
        blob_discard(blob=blob)


def _task(training: Training, owner: User, number: int) -> Task | None:
    found = Task.objects.select_related("round__base_version__blob", "continues__blob")
    return found.filter(
        round__training=training, round__number=number, user=owner, kind=TaskKind.TRAIN
    ).first()


def _base(training: Training, task: Task | None, said: int | None) -> Blob:
    """The weights that the task began with; without one, those of the training, for the names."""
    if task is None:
        return training.base_version.blob
    if task.continues is not None and task.continues.blob is not None:
        return task.continues.blob
    version = task.round.base_version
    if said is not None and said != version.number:
        raise Conflict(
            f"the update is from version {said}, round {task.round.number} began with version "
            f"{version.number}; train on that one",
            code="BASE_VERSION",
            version=version.number,
        )
    return version.blob


def update_from_upload(*, upload: Upload, **fields: Any) -> Receipt:
    """`update_submit` of a resumable upload, which is used up by it. Again: the same receipt.

    A refused update leaves the upload as it is until it expires; `UPLOAD_USED` if it has become
    something else. `Unavailable` (BUSY) if too many wait for their turn: nothing is lost by asking again.
    """
    if upload.update is not None:
        asked = (
            str(fields["model_id"]),
            fields["round"],
            fields["sample_size"],
            fields["owner"].pk,
        )
        if asked != _identity(upload.update):
            raise Conflict("this upload was used for another update", code="UPLOAD_USED")
        return _receipt(upload.update, created=False)
    with NAMED.one(str(fields["owner"].pk)) as granted:
        if not granted:
            raise Unavailable(
                "too many updates wait for their turn; send the same form again in a moment",
                code="BUSY",
                retry_after=RETRY_SECONDS,
            )
        with upload_taken(upload) as taken:
            receipt = update_submit(file=taken.staged_path, sha256=taken.sha256, **fields)
    upload_used(upload, update=receipt.update)
    return receipt


def _identity(update: LocalModel) -> tuple[Any, ...]:
    number, model = (update.trained_in or update.round).number, update.training.model_id
    return str(model), number, update.sample_size, update.owner_id


def _receipt(update: LocalModel, created: bool) -> Receipt:
    tally = rounds.round_tally(update.round, TaskKind.TRAIN)
    enough = policy_of(update.round.policy).buffer_size or tally.total
    needed = min(tally.done + tally.open, enough)
    return Receipt(update, created, tally.done, needed, update.round.deadline)


@committing("metrics.accept")
def metrics_submit(
    *,
    model_id: uuid.UUID | str,
    reporter: User,
    metrics: dict[str, Value],
    sample_size: int | None = None,
    round: int | None = None,
) -> GlobalModel:
    """Store metrics of a model. From a participant in a test round they end his part in it.

    With a `round`, only if the model is still there; else the training goes by the order of arrival.
    What an owner adds to a model without a training counts for his quota: `Conflict` (STORAGE_QUOTA).
    """
    model = get_visible(models_visible_to(reporter), model_id)
    metric_names_check(metrics)
    if sample_size is not None:
        rounds.sample_size_check(sample_size)
    found = Training.objects.filter(model=model).first()
    if found is None:
        if model.owner_id != reporter.pk and not reporter.is_superuser:
            raise NotPermitted("only its owner may add metrics to a model without a training")
        if not rounds.evaluation_repeated(
            model=model, reporter=reporter, metrics=metrics, number=round
        ):
            if model.owner_id == reporter.pk:
                storage_check(user=reporter, size=metrics_size(metrics))
            metrics_record(
                model=model,
                reporter=reporter,
                step=model.round,
                metrics=metrics,
                sample_size=sample_size,
            )
        return model
    training = training_locked(found.pk)
    if training.actor_id != reporter.pk or training.memberships.filter(user=reporter).exists():
        rounds.membership_check(training=training, user=reporter)
    rounds.evaluation_record(
        training=training,
        reporter=reporter,
        metrics=metrics,
        sample_size=sample_size,
        number=round,
    )
    round_advance(training_id=training.pk)
    return training.model
