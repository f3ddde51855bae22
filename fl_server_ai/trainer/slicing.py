"""A large round by many workers: its work is planned as slices, each is made by who is free, the last one tells.

Nobody waits for anybody: who finds slices unfinished gives the event back, and the worker of the last slice wakes it. So
one worker alone comes to the end as well, slice by slice.
"""

import hashlib
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from django.conf import settings
from django.db import transaction

from fl_server_ai.aggregation.combination import Survey
from fl_server_ai.aggregation.engine import Aggregated, Inputs
from fl_server_ai.aggregation.slices import (
    SliceChanged,
    Sliced,
    SliceFile,
    join,
    read_survey,
    survey_shares,
    write_slice,
    write_survey,
)
from fl_server_ai.dispatch import dispatch_event, dispatch_slices
from fl_server_ai.services.crowd import aggregation_workers
from fl_server_ai.services.leases import lease_kept
from fl_server_ai.services.lost import updates_lost
from fl_server_ai.services.reconciler import event_give_up
from fl_server_ai.services.training_options import TrainerOptions, strategy_of, trainer_options
from fl_server_ai.trainer.inputs import opened_inputs, plan_of, updates_of
from fl_server_ai.trainer.intact import UpdatesLost
from fl_server_ai.trainer.trying import tried
from fl_server_core.killpoints import committing, reached
from fl_server_core.lifecycle import EventState, RoundPhase, TrainingState
from fl_server_core.models import LocalModel, Round, SliceKind, TrainerEvent, Training, WorkSlice
from fl_server_core.services.blobs import blob_discard, blob_store
from fl_server_core.services.events import event_held, event_wake
from fl_server_core.services.slices import (
    slice_again,
    slice_claim,
    slice_finish,
    slice_release,
    slice_renew,
    slices_drop,
    slices_plan,
    slices_unfinished,
)
from fl_server_core.services.trainings import training_locked
from fl_server_core.storage import local_path, staging_path

log = logging.getLogger("fl.celery")
EACH = 2  # slices for every worker: who is slow, or dies, holds up less
MOST = 64


class OthersAtWork(Exception):
    """The event has nothing to do before its slices are made."""


def slices_for(event: TrainerEvent | None, updates: Sequence[LocalModel]) -> int:
    """Into how many slices the round is cut; 0 where one worker makes it in one go."""
    if event is None:
        return 0
    begun = dict(event.slices.values_list("kind", "of"))
    if SliceKind.COLUMNS in begun:
        return begun[SliceKind.COLUMNS]
    total = sum(update.size for update in updates)
    large = 0 < settings.FL_SHARED_ROUND_BYTES <= total
    workers = aggregation_workers() if large else 1
    wanted = min(MOST, EACH * workers) if workers > 1 else 0
    return max(wanted, begun.get(SliceKind.SURVEY, 0))  # once begun, it is shared to its end


def slices_joined(
    training: Training,
    round: Round,
    updates: Sequence[LocalModel],
    options: TrainerOptions,
    event: TrainerEvent,
    of: int,
    out: Path,
    state_out: Path,
) -> Aggregated:
    """The round's files from its slices, as the engine makes them alone; `OthersAtWork` until all are there.

    Plans what is to be done next, where nothing is. Slices of other inputs than the present ones are dropped.
    """
    plan = plan_of(training, round, updates, options)
    slices = list(event.slices.select_related("result"))
    if any(one.plan != plan for one in slices):
        _drop(event)
        slices = []
    if any(one.state != EventState.DONE for one in slices):
        raise OthersAtWork
    surveys = [one for one in slices if one.kind == SliceKind.SURVEY]
    columns = [one for one in slices if one.kind == SliceKind.COLUMNS]
    if not columns:
        shares = survey_shares(strategy_of(training), of)
        kind, number = (
            (SliceKind.SURVEY, shares) if shares and not surveys else (SliceKind.COLUMNS, of)
        )
        with opened_inputs(training, round, updates, options):
            pass  # what was lost is lost before anybody begins
        _plan(event, kind, number, plan)
        raise OthersAtWork
    with opened_inputs(training, round, updates, options) as inputs, ExitStack() as stack:
        survey = _survey(surveys, stack)
        try:
            made = join(inputs, survey, _files(columns, stack), out=out, state_out=state_out)
        except SliceChanged as error:
            _again(columns[error.index], str(error))
            raise OthersAtWork from error
    made.warnings.extend(dict.fromkeys(text for one in slices for text in one.warnings))
    return made


@transaction.atomic
def _drop(event: TrainerEvent) -> None:
    """Who has lost the event knows less than who has it."""
    training_locked(event.training_id)
    if event_held(event=event):
        slices_drop(event=event)


@committing("slices.plan")
def _plan(event: TrainerEvent, kind: SliceKind, of: int, plan: str) -> None:
    training_locked(event.training_id)
    if not event_held(event=event) or event.slices.filter(kind=kind).exists():
        return
    rows = slices_plan(event=event, kind=kind, of=of, plan=plan)
    log.info("%s: %s slices (%s) for all workers", event.training_id, of, kind)
    dispatch_slices([row.pk for row in rows])


def _again(one: WorkSlice, why: str) -> None:
    slice_again(one=one, error=why)
    dispatch_slices([one.pk])


def _survey(surveys: Sequence[WorkSlice], stack: ExitStack) -> Survey:
    """What the shares found. One whose file is damaged is made again first."""
    paths = []
    for one in surveys:
        if one.result is None:
            raise OthersAtWork
        try:
            path = stack.enter_context(local_path(one.result))
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            digest = ""
        if digest != one.result.digest:
            _again(one, "its file is gone, or is not what was made")
            raise OthersAtWork
        paths.append(path)
    return read_survey(paths)


def _files(columns: Sequence[WorkSlice], stack: ExitStack) -> list[SliceFile]:
    """What the slices made. `SliceChanged` for the first one that a storage without paths has lost."""
    files = []
    for one in columns:
        if one.result is None:
            raise OthersAtWork
        try:
            path = stack.enter_context(local_path(one.result))
        except FileNotFoundError:
            raise SliceChanged(one.index, "has disappeared") from None
        files.append(SliceFile(path, one.result.digest, one.recipe))
    return files


def event_tell(event_id: int) -> None:
    """Wake the event if all its slices are made, or none are planned."""
    if not slices_unfinished(event_id=event_id) and event_wake(event_id=event_id):
        dispatch_event(event_id)


def slice_work(slice_id: int) -> None:
    """Make the slice if it is there to be claimed; otherwise nothing happens."""
    work = slice_claim(slice_id=slice_id)
    if work is None:
        return
    event = work.event
    training, round = event.training, event.round
    where = f"training {training.pk} round {round.number} {work.kind} {work.index + 1}/{work.of}"

    def give_up(reason: str) -> None:
        event_give_up(event=event, reason=reason)
        slice_release(one=work, error=reason)  # if somebody else has the event just now

    with lease_kept(partial(slice_renew, one=work)):
        release = partial(slice_release, one=work)
        with tried(f"{where}, attempt {work.attempt}", release=release, give_up=give_up):
            if training.state == TrainingState.PAUSED:
                slice_release(one=work, error="", spent=False)
                return
            try:
                if _make(work, training, round):
                    log.info("%s: made, attempt %s", where, work.attempt)
            except UpdatesLost as error:
                updates_lost(event=event, lost=error.lost)
                slice_release(one=work, error=str(error), spent=False)
            except OthersAtWork:
                slice_release(one=work, error="", spent=False)
    event_tell(event.pk)


def _make(work: WorkSlice, training: Training, round: Round) -> bool:
    """Whether the slice is made, by this attempt."""
    options = trainer_options(training)
    updates = updates_of(training, round, options)
    over = round.phase != RoundPhase.AGGREGATING or round.result_version_id is not None
    if over or plan_of(training, round, updates, options) != work.plan:
        slices_drop(event=work.event, plan=work.plan)  # others may have been planned by now
        return False
    out = staging_path(".slice")
    try:
        with opened_inputs(training, round, updates, options, since=work.created_at) as inputs:
            made = _write(work, inputs, out)
        reached("slice.written")
        blob = blob_store(source=out, digest=made.digest, size=made.size, suffix=".slice")
        try:
            stored = slice_finish(one=work, blob=blob, recipe=made.recipe, warnings=made.warnings)
        except BaseException:
            blob_discard(blob=blob)
            raise
        if not stored:
            blob_discard(blob=blob)
        return stored
    finally:
        out.unlink(missing_ok=True)


def _write(work: WorkSlice, inputs: Inputs, out: Path) -> Sliced:
    device = settings.FL_AGGREGATION_DEVICE
    if work.kind == SliceKind.SURVEY:
        return write_survey(inputs, index=work.index, of=work.of, out=out, device=device)
    surveys = work.event.slices.filter(kind=SliceKind.SURVEY).select_related("result")
    with ExitStack() as stack:
        survey = _survey(list(surveys), stack)
        return write_slice(inputs, survey, index=work.index, of=work.of, out=out, device=device)
