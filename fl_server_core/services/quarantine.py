"""Updates that a worker has a look at before they count: what is decided, and what may be decided anew.

The owner's part in the round says the same as the update: one that is out is nobody's answer. Callers hold the
training's row lock, and ask afterwards whether the round goes on.
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
    move_all,
)
from fl_server_core.models import Blob, LocalModel, Round, Task, User
from fl_server_core.selectors.parts import QUARANTINED, UPDATE_REFUSED
from fl_server_core.services.blobs import blobs_doom_unreferenced

log = logging.getLogger("fl.server")
CODES = {UpdateState.REFUSED: UPDATE_REFUSED, UpdateState.QUARANTINED: QUARANTINED}
NO_FILES = {"blob": None, "extras": None, "mask": None}


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
    update = LocalModel.objects.get(pk=verdict.update.pk)
    if update.state != UpdateState.RECEIVED:
        return False
    if verdict.state == UpdateState.ACCEPTED:
        replaced = [update.blob_id] if verdict.blob is not None and update.blob_id else []
        if verdict.blob is not None:
            verdict.blob.save()
        fields = {} if verdict.blob is None else {"blob": verdict.blob}
        move(update, UpdateState.ACCEPTED, **fields)
        blobs_doom_unreferenced(ids=replaced)
        return True
    log.warning("update %s is %s: %s", update.pk, verdict.state, verdict.reason)
    gone = _files(update) if verdict.state == UpdateState.REFUSED else []
    move(update, verdict.state, reason=verdict.reason, **(NO_FILES if gone else {}))
    blobs_doom_unreferenced(ids=gone)
    task = _part(update)
    if task is not None and task.state == TaskState.DONE:
        said = f"{CODES[verdict.state]}: {verdict.reason}"[:4000]
        move(task, TaskState.CANCELLED, failure=said, finished_at=timezone.now())
    return True


def release(update: LocalModel, *, user: User) -> None:
    """Let a quarantined update count after all; one that counts already stays as it is.

    Its round must still collect, or have failed, so that a retry finds it; else `RoundClosed`.
    """
    if update.state in {UpdateState.ACCEPTED, UpdateState.CONSUMED}:
        return
    _check_quarantined(update)
    training, round = update.training, update.round
    failed = training.state == TrainingState.ERROR and round.phase == RoundPhase.FAILED
    running = training.state in {TrainingState.ONGOING, TrainingState.PAUSED}
    open = running and round.phase in OPEN_PHASES
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
    gone = _files(update)
    move(
        update,
        UpdateState.REFUSED,
        reason=f"refused by {user}; was: {update.reason}",
        **NO_FILES,
    )
    blobs_doom_unreferenced(ids=gone)


def quarantine_settle() -> int:
    """Refuse what is still in quarantine in trainings that have ended, and give its files up. Returns how many."""
    ended = [TrainingState.COMPLETED, TrainingState.CANCELLED]
    left = list(
        LocalModel.objects.filter(state=UpdateState.QUARANTINED, training__state__in=ended)[:500]
    )
    gone = [pk for update in left for pk in _files(update)]
    move_all(left, UpdateState.REFUSED, **NO_FILES)
    blobs_doom_unreferenced(ids=gone)
    return len(left)


def _check_quarantined(update: LocalModel) -> None:
    if update.state != UpdateState.QUARANTINED:
        raise IllegalMove(
            f"update {update.pk} is {update.state}; only a quarantined one can be decided on",
            state=update.state,
        )


def _files(update: LocalModel) -> list[int]:
    ids = (update.blob_id, update.extras_id, update.mask_id)
    return [pk for pk in ids if pk is not None]


def _part(update: LocalModel) -> Task | None:
    return Task.objects.filter(
        round=update.round_id, user=update.owner_id, kind=TaskKind.TRAIN
    ).first()
