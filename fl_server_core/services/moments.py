"""SWAG rounds: opening one, and taking in moments. Callers hold the training's row lock."""

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
    *, training: Training, owner: User, number: int, sample_size: int, first: Blob, second: Blob
) -> tuple[SwagMoments, bool]:
    """Store a participant's moments; the same again is fine at any time. Returns them and whether they are new."""
    digest = f"{first.digest}.{second.digest}"
    known = SwagMoments.objects.filter(
        training=training, owner=owner, digest=digest, sample_size=sample_size,
        round__number=number - 1,
    ).first()  # fmt: skip
    if known is not None:
        return known, False
    membership_check(training=training, user=owner)
    task = _open_task(training, owner, number)
    first.save()
    second.save()
    moments = SwagMoments.objects.create(
        training=training, round=task.round, owner=owner, sample_size=sample_size,
        first=first, second=second, digest=digest,
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
    *, round: Round, sample_size: int, first: Blob, second: Blob, delete: bool
) -> bool:
    """Store what all moments of a round came to, once; `delete` gives the participants' files up."""
    if SwagMoments.objects.filter(round=round, owner=None).exists():
        return False
    first.save()
    second.save()
    SwagMoments.objects.create(
        training=round.training, round=round, owner=None, sample_size=sample_size,
        first=first, second=second, digest=f"{first.digest}.{second.digest}",
    )  # fmt: skip
    if delete:
        own = SwagMoments.objects.filter(~Q(owner=None), round=round)
        blobs = [pk for pair in own.values_list("first_id", "second_id") for pk in pair if pk]
        own.update(first=None, second=None)
        blobs_doom_unreferenced(ids=blobs)
    return True


def combined_moments(training: Training) -> SwagMoments | None:
    """The newest combined moments of a training."""
    return (
        SwagMoments.objects.filter(training=training, owner=None)
        .select_related("first", "second", "round")
        .order_by("-round__number")
        .first()
    )
