"""Updates that a worker has a look at before they count: what is decided, and what may be decided anew.

The owner's part in the round says the same as the update. In quarantine it is closed (CANCELLED) and the round waits
for somebody's decision, at most until its deadline; refused it has failed, which the round's policy deals with.
Callers hold the training's row lock, and ask afterwards whether the round goes on.
"""

import logging
from dataclasses import dataclass

from django.utils import timezone

from fl_server_core.exceptions import IllegalMove, RoundClosed
from fl_server_core.lifecycle import (
    OPEN_PHASES,
    RoundPhase,
    TaskKind,
    TaskState,
    TrainingState,
    UpdateState,
    move,
)
from fl_server_core.models import Blob, LocalModel, Round, Task, Training, User
from fl_server_core.selectors.own_updates import OVER
from fl_server_core.selectors.parts import QUARANTINED, UPDATE_REFUSED
from fl_server_core.services.blobs import blobs_doom_unreferenced
from fl_server_core.services.rounds import tasks_retry_refused

log = logging.getLogger("fl.server")
NO_FILES = {"blob": None, "extras": None, "mask": None}
RUNNING = frozenset({TrainingState.ONGOING, TrainingState.PAUSED})
NOBODY_DECIDED = "NOT_DECIDED: the round ended while it was in quarantine"


@dataclass(frozen=True)
class Verdict:
    """What was decided on an update: ACCEPTED, with another file if `blob` is one; REFUSED; or QUARANTINED."""

    update: LocalModel
    state: UpdateState = UpdateState.ACCEPTED
    reason: str = ""
    blob: Blob | None = None  # unsaved


def updates_unchecked(round: Round) -> bool:
    """Whether updates of this round wait for a worker's look."""
    return LocalModel.objects.filter(round=round, state=UpdateState.RECEIVED).exists()


def update_judge(verdict: Verdict) -> bool:
    """Let a verdict count; False, and nothing happens, if the update has been decided on already."""
    update = LocalModel.objects.select_related("round__training").get(pk=verdict.update.pk)
    if update.state != UpdateState.RECEIVED:
        return False
    if verdict.state == UpdateState.ACCEPTED:
        _accept(update, verdict.blob)
        return True
    log.warning("update %s is %s: %s", update.pk, verdict.state, verdict.reason)
    if verdict.state == UpdateState.REFUSED:
        _refuse(update, verdict.reason)
        return True
    move(update, UpdateState.QUARANTINED, reason=verdict.reason)
    task = _part(update)
    if task is not None and task.state == TaskState.DONE:
        said = f"{QUARANTINED}: {verdict.reason}"[:4000]
        move(task, TaskState.CANCELLED, failure=said, finished_at=timezone.now())
    return True


def _accept(update: LocalModel, blob: Blob | None) -> None:
    if blob is None:
        move(update, UpdateState.ACCEPTED)
        return
    replaced = [] if update.blob_id is None else [update.blob_id]
    blob.save()
    move(update, UpdateState.ACCEPTED, blob=blob)
    blobs_doom_unreferenced(ids=replaced)


def _refuse(update: LocalModel, reason: str) -> None:
    """For good, with its files. Its owner has failed, and is asked again at once if the policy says so."""
    files = (update.blob_id, update.extras_id, update.mask_id)
    move(update, UpdateState.REFUSED, reason=reason, **NO_FILES)
    blobs_doom_unreferenced(ids=[pk for pk in files if pk is not None])
    task, round = _part(update), update.round
    if task is None or task.state not in {TaskState.DONE, TaskState.CANCELLED}:
        return
    said = f"{UPDATE_REFUSED}: {reason}"[:4000]
    move(task, TaskState.FAILED, failure=said, finished_at=timezone.now())
    tasks_retry_refused(round, [task])


def release(update: LocalModel, *, user: User) -> None:
    """Let a quarantined update count after all; one that counts already stays as it is.

    Its round must still collect, or have failed, so that a retry finds it; else `RoundClosed`.
    """
    if update.state in {UpdateState.ACCEPTED, UpdateState.CONSUMED}:
        return
    _check_quarantined(update)
    training, round = update.training, update.round
    failed = training.state == TrainingState.ERROR and round.phase == RoundPhase.FAILED
    open = training.state in RUNNING and round.phase in OPEN_PHASES
    if not open and not (failed and round.result_version_id is None):
        raise RoundClosed(
            f"round {round.number} has gone on without this update (it is {round.phase}); it can't count any more",
            round=training.model.round,
            state=training.state,
        )
    move(update, UpdateState.ACCEPTED, reason=f"released by {user}; was: {update.reason}")
    task = _part(update)
    if task is not None and task.state == TaskState.CANCELLED:
        move(task, TaskState.DONE, failure="", finished_at=timezone.now())


def refuse(update: LocalModel, *, user: User) -> None:
    """Give a quarantined update up for good, and its files; one that is refused already stays as it is."""
    if update.state == UpdateState.REFUSED:
        return
    _check_quarantined(update)
    _refuse(update, f"refused by {user}; was: {update.reason}")


def quarantine_settle(training: Training) -> int:
    """Refuse what is in quarantine although its round is over, and give its files up. Returns how many."""
    left = list(
        LocalModel.objects.filter(OVER, training=training, state=UpdateState.QUARANTINED)
        .select_related("round__training")
        .order_by("pk")[:500]
    )
    for update in left:
        _refuse(update, f"{NOBODY_DECIDED}; was: {update.reason}")
    return len(left)


def quarantine_overdue() -> list[Training]:
    """Trainings in which `quarantine_settle` would find something."""
    found = LocalModel.objects.filter(OVER, state=UpdateState.QUARANTINED)
    return list(Training.objects.filter(pk__in=found.values("training")))


def _check_quarantined(update: LocalModel) -> None:
    if update.state != UpdateState.QUARANTINED:
        raise IllegalMove(
            f"update {update.pk} is {update.state}; only a quarantined one can be decided on",
            state=update.state,
        )


def _part(update: LocalModel) -> Task | None:
    found = Task.objects.filter(round=update.round_id, user=update.owner_id, kind=TaskKind.TRAIN)
    return found.select_related("user").first()
