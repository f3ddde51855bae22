"""SWAG rounds: opening one, and taking in moments. Callers hold the training's row lock."""

from collections.abc import Sequence
from datetime import timedelta

from django.db.models import Q
from django.utils import timezone

from fl_server_core.exceptions import DuplicateUpdate, RoundClosed
from fl_server_core.lifecycle import RoundPhase, TaskKind, TaskState, TrainingState, move
from fl_server_core.models import Blob, Round, SwagMoments, Task, Training, User
from fl_server_core.models.notifications import NotificationType
from fl_server_core.services.blobs import blobs_doom_unreferenced
from fl_server_core.services.rounds import current_round, membership_check, tasks_ask
from fl_server_core.services.trainings import participants_active


def swag_open(*, round: Round, seconds: float) -> None:
    """Ask everybody who is in for moments of the round's new model; the number is the one after it."""
    training = round.training
    move(training, TrainingState.SWAG_ROUND, last_update=timezone.now())
    move(round, RoundPhase.SWAG, deadline=timezone.now() + timedelta(seconds=seconds))
    tasks_ask(
        round,
        participants_active(training),
        TaskKind.SWAG,
        training.model.round,
        NotificationType.SWAG_ROUND_START,
    )


def moments_accept(
    *,
    training: Training,
    owner: User,
    number: int,
    sample_size: int,
    first: Blob,
    second: Blob,
    deviations: Blob | None = None,
) -> tuple[SwagMoments, bool]:
    """Store a participant's moments; the same again is fine at any time. Returns them and whether they are new."""
    digest = _digest(first, second, deviations)
    known = SwagMoments.objects.filter(
        training=training, owner=owner, digest=digest, sample_size=sample_size,
        round__number=number - 1,
    ).first()  # fmt: skip
    if known is not None:
        return known, False
    membership_check(training=training, user=owner)
    task = _open_task(training, owner, number)
    _save(first, second, deviations)
    moments = SwagMoments.objects.create(
        training=training, round=task.round, owner=owner, sample_size=sample_size,
        first=first, second=second, deviations=deviations, digest=digest,
    )  # fmt: skip
    move(task, TaskState.DONE, finished_at=timezone.now())
    return moments, True


def _open_task(training: Training, owner: User, number: int) -> Task:
    round = current_round(training)
    at = training.model.round
    if round is None or round.phase != RoundPhase.SWAG or number != at:
        raise RoundClosed(
            f"no SWAG round {number} takes moments now; the training is at round {at}",
            round=at,
            state=training.state,
        )
    task = round.tasks.filter(user=owner, kind=TaskKind.SWAG).first()
    if task is None:
        raise RoundClosed("you were not asked for moments", code="NOT_SELECTED", round=number)
    if task.state == TaskState.DONE:
        raise DuplicateUpdate(f"you have already sent other moments for round {number}")
    if task.state != TaskState.OPEN:
        raise RoundClosed(
            f"your part in SWAG round {number} is {task.state}: {task.failure}",
            code="TASK_CLOSED",
            round=number,
        )
    return task


def moments_publish(
    *,
    round: Round,
    sample_size: int,
    first: Blob,
    second: Blob,
    delete: bool,
    deviations: Blob | None = None,
    notes: Sequence[str] = (),
) -> bool:
    """Store what all moments of a round came to, once; `delete` gives the participants' files up.

    `notes` go to the round's warnings.
    """
    if SwagMoments.objects.filter(round=round, owner=None).exists():
        return False
    _save(first, second, deviations)
    SwagMoments.objects.create(
        training=round.training, round=round, owner=None, sample_size=sample_size,
        first=first, second=second, deviations=deviations,
        digest=_digest(first, second, deviations),
    )  # fmt: skip
    if notes:
        Round.objects.filter(pk=round.pk).update(warnings=[*round.warnings, *notes])
    if delete:
        own = SwagMoments.objects.filter(~Q(owner=None), round=round)
        files = own.values_list("first_id", "second_id", "deviations_id")
        blobs = [pk for ids in files for pk in ids if pk]
        own.update(first=None, second=None, deviations=None)
        blobs_doom_unreferenced(ids=blobs)
    return True


def _digest(*files: Blob | None) -> str:
    return ".".join(file.digest for file in files if file is not None)


def _save(*files: Blob | None) -> None:
    for file in files:
        if file is not None:
            file.save()


def combined_moments(training: Training) -> SwagMoments | None:
    """The newest combined moments of a training."""
    return (
        SwagMoments.objects.filter(training=training, owner=None)
        .select_related("first", "second", "deviations", "round")
        .order_by("-round__number")
        .first()
    )
