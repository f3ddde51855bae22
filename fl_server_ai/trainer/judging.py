"""A worker's look at updates before they count: the strategy's check, the norm bound, and the others' direction."""

import math
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fl_server_ai.aggregation import RoundFacts, Strategy, UpdateMeta
from fl_server_ai.aggregation.blocks import UpdateFile
from fl_server_ai.aggregation.outliers import cosines, norms, products
from fl_server_ai.aggregation.step import overrides
from fl_server_ai.services.lost import CODE as LOST
from fl_server_ai.services.rounds import tell
from fl_server_ai.services.training_options import TrainerOptions, strategy_of
from fl_server_ai.trainer.checking import Outcome, update_check
from fl_server_ai.trainer.intact import fault_of
from fl_server_core.killpoints import committing, reached
from fl_server_core.lifecycle import OPEN_PHASES, TaskKind, UpdateState
from fl_server_core.models import Blob, LocalModel, Round, TrainerEvent, Training
from fl_server_core.services.blobs import blob_discard, blob_store
from fl_server_core.services.events import event_held
from fl_server_core.services.quarantine import Verdict, update_judge
from fl_server_core.services.trainings import training_locked
from fl_server_core.storage import local_path, staging_path


@dataclass
class _Case:
    """An update with its file, which may be one that the strategy has made of it, still in staging."""

    update: LocalModel
    path: Path
    digest: str = ""  # of a file that replaces the update's own
    verdict: Verdict | None = None


def updates_judge(
    training: Training, round: Round, options: TrainerOptions, work: TrainerEvent | None
) -> None:
    """Decide on every update of the round that waits, and commit all verdicts at once.

    A kill loses nothing: without the commit they still wait. Of two workers the first to commit decides. Memory does
    not grow with the model: see `update_check` for the strategy's part; the comparison keeps a block of 8 MiB for each
    thread, and 64 bytes for each pair of updates.
    """
    related = ("blob", "round__base_version__blob")
    found = LocalModel.objects.filter(round=round).select_related(*related).order_by("owner_id")
    waiting = list(found.filter(state=UpdateState.RECEIVED))
    if not waiting:
        return
    strategy = strategy_of(training)
    strategy.facts = RoundFacts(
        number=round.number,
        rounds=training.target_num_updates,
        population=int(round.policy.get("population", 0)),
        actor=str(training.actor_id),
    )
    blobs: list[Blob] = []
    with ExitStack() as stack:
        cases = [_case(update, stack) for update in waiting if update.blob is not None]
        if overrides(strategy, "check"):
            if round.base_version.scalars:
                strategy.load_state_dict(round.base_version.scalars)
            for case in cases:
                if case.verdict is None:
                    _check(case, strategy, options, stack)
        base = stack.enter_context(local_path(round.base_version.blob))
        others = list(found.filter(state=UpdateState.ACCEPTED))
        _measure(cases, others, base, options, stack)
        try:
            verdicts = [_verdict(case, blobs) for case in cases]
            reached("updates.judged")
            published = _publish(training, round, verdicts, work)
        except BaseException:
            _discard(blobs)
            raise
    if not published:
        _discard(blobs)


def _case(update: LocalModel, stack: ExitStack) -> _Case:
    """The update with its file; one whose file was lost since has its verdict."""
    blob = update.blob
    assert blob is not None  # noqa: S101 - the caller looked
    try:
        path = stack.enter_context(local_path(blob))
        fault = fault_of(blob, path)
    except FileNotFoundError:
        path, fault = Path(), "its file has disappeared"
    verdict = Verdict(update, UpdateState.REFUSED, f"{LOST}: {fault}") if fault else None
    return _Case(update, path, verdict=verdict)


def _check(case: _Case, strategy: Strategy[Any], options: TrainerOptions, stack: ExitStack) -> None:
    update = case.update
    meta = UpdateMeta(
        participant=str(update.owner_id),
        num_examples=update.sample_size,
        num_steps=update.num_steps,
        extras=update.numbers,
    )
    path = staging_path(".safetensors")
    stack.callback(path.unlink, missing_ok=True)
    found = update_check(strategy, meta, case.path, path)
    if found.outcome == Outcome.REFUSED:
        case.verdict = Verdict(update, UpdateState.REFUSED, found.reason)
    elif found.outcome == Outcome.BAD:
        case.verdict = _bad(case, found.reason, options)
    elif found.outcome == Outcome.REPLACED:
        case.path, case.digest = path, found.digest


def _bad(case: _Case, reason: str, options: TrainerOptions) -> Verdict:
    refuse = options.bad_updates == "refuse"
    state = UpdateState.REFUSED if refuse else UpdateState.QUARANTINED
    return Verdict(case.update, state, reason)


def _measure(
    cases: list[_Case],
    others: list[LocalModel],
    base: Path,
    options: TrainerOptions,
    stack: ExitStack,
) -> None:
    """Verdicts of the norm bound, then of the comparison of those that are left with each other and with `others`."""
    bound, least = options.max_update_norm, options.min_update_cosine
    for case in cases:
        if bound is not None and case.verdict is None:
            # Each for itself: the same sum whoever it is looked at with.
            [norm] = norms(products(base, [_file(case)]))
            if not norm <= bound:
                said = f"NORM: |update - base| is {norm:.6g}, max_update_norm is {bound:.6g}"
                case.verdict = _bad(case, said, options)
    left = [case for case in cases if case.verdict is None]
    if least is None or not left:
        return
    found = [_case(update, stack) for update in others if update.blob is not None]
    compared = [case for case in found if case.verdict is None]
    gram = products(base, [_file(case) for case in [*left, *compared]])
    for case, norm, cosine in zip(left, norms(gram), cosines(gram), strict=False):
        if math.isinf(norm):
            said = "NORM: |update - base| is too large to be compared"
            case.verdict = _bad(case, said, options)
        elif cosine is not None and cosine < least:
            said = (
                f"COSINE: with the mean direction of the other updates of the round it is {cosine:.4f}, "
                f"min_update_cosine is {least:.4f}"
            )
            case.verdict = _bad(case, said, options)


def _file(case: _Case) -> UpdateFile:
    meta = UpdateMeta(participant=str(case.update.owner_id), num_examples=case.update.sample_size)
    return UpdateFile(case.path, meta)


def _verdict(case: _Case, blobs: list[Blob]) -> Verdict:
    if case.verdict is not None:
        return case.verdict
    if not case.digest:
        return Verdict(case.update)
    blob = blob_store(source=case.path, digest=case.digest, size=case.path.stat().st_size)
    blobs.append(blob)
    return Verdict(case.update, blob=blob)


@committing("updates.judge")
def _publish(
    training: Training, round: Round, verdicts: list[Verdict], work: TrainerEvent | None
) -> bool:
    training_locked(training.pk)
    if Round.objects.get(pk=round.pk).phase not in OPEN_PHASES:
        return False
    if work is not None and not event_held(event=work):
        return False
    counted = [update_judge(verdict) for verdict in verdicts]
    owners = [verdict.update.owner_id for verdict in verdicts if verdict.reason]
    tell(round.tasks.filter(user__in=owners, kind=TaskKind.TRAIN))
    return all(counted)


def _discard(blobs: list[Blob]) -> None:
    for blob in blobs:
        blob_discard(blob=blob)  # unless it has a row
