"""Taking in updates and metrics: read, check, make durable, commit, and only then acknowledge."""

import uuid
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from django.db import transaction

from fl_server_ai.containers import check_against, check_finite, check_ties, read_manifest
from fl_server_ai.services.intake import canonical_blob
from fl_server_ai.services.rounds import round_advance
from fl_server_core.exceptions import Conflict, Invalid, NotFound, NotPermitted
from fl_server_core.lifecycle import TaskKind
from fl_server_core.models import GlobalModel, LocalModel, Training, Upload, User
from fl_server_core.selectors import get_visible, models_visible_to
from fl_server_core.services import rounds
from fl_server_core.services.blobs import blob_discard
from fl_server_core.services.metrics import Value, metric_names_check, metrics_record
from fl_server_core.services.round_policy import policy_of
from fl_server_core.services.trainings import training_locked
from fl_server_core.services.uploads import upload_taken, upload_used
from fl_server_core.storage import local_path


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
) -> Receipt:
    """Store one client's update. Once this returns, a power cut doesn't lose it.

    The same update again gets the same receipt with `created=False`, however late. Two simultaneous
    last updates are put in order by the training's row lock, and one of them closes the round.
    """
    training = update_precheck(model_id=model_id, user=owner)
    metric_names_check(metrics)
    if not 1 <= sample_size <= rounds.MAX_SAMPLES:
        raise Invalid(f"sample_size is 1 to {rounds.MAX_SAMPLES}", code="SAMPLE_SIZE")
    with canonical_blob(file, sha256=sha256) as (manifest, blob, publish):
        with local_path(training.base_version.blob) as base:
            check_against(manifest, read_manifest(base))
        check_ties(publish.path, manifest, training.model.ties)
        check_finite(publish.path, manifest)
        publish()
        try:
            with transaction.atomic():
                training = training_locked(training.pk)
                update, created = rounds.update_accept(
                    training=training,
                    owner=owner,
                    number=round,
                    sample_size=sample_size,
                    blob=blob,
                    metrics=metrics,
                )
                receipt = _receipt(update, created)
                if created:
                    round_advance(training_id=training.pk)
        except BaseException:
            blob_discard(blob=blob)
            raise
    if not created:
        blob_discard(blob=blob)
    return receipt


def update_from_upload(*, upload: Upload, **fields: Any) -> Receipt:
    """`update_submit` of a resumable upload, which is used up by it. Again: the same receipt.

    A refused update leaves the upload as it is until it expires; `UPLOAD_USED` if it has become
    something else.
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
    with upload_taken(upload) as taken:
        receipt = update_submit(file=taken.staged_path, sha256=taken.sha256, **fields)
    upload_used(upload, update=receipt.update)
    return receipt


def _identity(update: LocalModel) -> tuple[Any, ...]:
    number, model = update.round.number, update.training.model_id
    return str(model), number, update.sample_size, update.owner_id


def _receipt(update: LocalModel, created: bool) -> Receipt:
    tally = rounds.round_tally(update.round, TaskKind.TRAIN)
    enough = policy_of(update.round.policy).buffer_size or tally.total
    needed = min(tally.done + tally.open, enough)
    return Receipt(update, created, tally.done, needed, update.round.deadline)


@transaction.atomic
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
    """
    model = get_visible(models_visible_to(reporter), model_id)
    metric_names_check(metrics)
    if sample_size is not None and not 1 <= sample_size <= rounds.MAX_SAMPLES:
        raise Invalid(f"sample_size is 1 to {rounds.MAX_SAMPLES}", code="SAMPLE_SIZE")
    found = Training.objects.filter(model=model).first()
    if found is None:
        if model.owner_id != reporter.pk and not reporter.is_superuser:
            raise NotPermitted("only its owner may add metrics to a model without a training")
        if not rounds.evaluation_repeated(
            model=model, reporter=reporter, metrics=metrics, number=round
        ):
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
