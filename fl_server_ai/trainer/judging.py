"""A worker's look at updates before they count: the strategy's check, the norm bound, and the others' direction."""

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from fl_server_ai.aggregation import RoundFacts, UpdateMeta
from fl_server_ai.aggregation.blocks import Draft, Source, UpdateFile, layout_of
from fl_server_ai.aggregation.outliers import cosines, norms, products
from fl_server_ai.aggregation.step import overrides
from fl_server_ai.aggregation.strategy import Refused, Strategy
from fl_server_ai.containers import check_finite, read_manifest
from fl_server_ai.services.training_options import TrainerOptions, strategy_of
from fl_server_core.exceptions import AggregationException, Unusable
from fl_server_core.killpoints import committing, reached
from fl_server_core.lifecycle import OPEN_PHASES, UpdateState
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

    A kill loses nothing: without the commit they still wait. Of two workers the first to commit decides.
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
        cases = [
            _Case(update, stack.enter_context(local_path(update.blob)))
            for update in waiting
            if update.blob is not None
        ]
        if overrides(strategy, "check"):
            if round.base_version.scalars:
                strategy.load_state_dict(round.base_version.scalars)
            for case in cases:
                _check(case, strategy, stack)
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


class _Tensors(Mapping[str, Tensor]):
    """The tensors of a file, each read when it is asked for."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self._file = stack.enter_context(safe_open(path, "pt"))
        self._names = list(self._file.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _check(case: _Case, strategy: Strategy[object], stack: ExitStack) -> None:
    update = case.update
    meta = UpdateMeta(
        participant=str(update.owner_id),
        num_examples=update.sample_size,
        num_steps=update.num_steps,
        extras=update.numbers,
    )
    with ExitStack() as opened:
        found = strategy.check(meta, _Tensors(case.path, opened))
        if isinstance(found, Refused):
            case.verdict = Verdict(update, UpdateState.REFUSED, found.reason[:2000])
        elif found is not None:
            path = staging_path(".safetensors")
            stack.callback(path.unlink, missing_ok=True)
            case.digest = _replaced(case.path, found, path, type(strategy).__name__)
            case.path = path


def _replaced(original: Path, tensors: Mapping[str, Tensor], path: Path, who: str) -> str:
    """Write what the strategy has made of an update, in the original's form; returns its SHA-256."""
    source = Source(original, "(checked)")
    draft = None
    try:
        layout = layout_of(source)
        draft = Draft(path, layout.header, layout.size)
        with safe_open(original, "pt") as before:
            if set(tensors) != {info.name for info in layout.tensors}:
                raise AggregationException(f"{who}.check gave back other tensors than it got")
            for info in layout.tensors:
                given, was = tensors[info.name].detach().cpu(), before.get_tensor(info.name)
                if given.shape != was.shape or given.dtype != was.dtype:
                    raise AggregationException(
                        f"{who}.check changed the shape or dtype of tensor {info.name!r}"
                    )
                if given.numel():
                    raw = given.contiguous().reshape(-1).view(torch.uint8).numpy()
                    draft.write(raw.data, info.offset)
        digest = draft.publish()
    finally:
        source.close()
        if draft is not None:
            draft.discard()
    try:
        check_finite(path, read_manifest(path))
    except Unusable as error:
        raise AggregationException(f"{who}.check made of an update: {error.detail}") from error
    return digest


def _measure(
    cases: list[_Case],
    others: list[LocalModel],
    base: Path,
    options: TrainerOptions,
    stack: ExitStack,
) -> None:
    """Verdicts of the norm bound, then of the comparison of those that are left."""
    bound, least = options.max_update_norm, options.quarantine_cosine
    left = [case for case in cases if case.verdict is None]
    if not left or (bound is None and least is None):
        return
    compared = [
        _Case(update, stack.enter_context(local_path(update.blob)))
        for update in (others if least is not None else [])
        if update.blob is not None
    ]
    gram = products(base, [_file(case) for case in [*left, *compared]])
    far = norms(gram)
    for case, norm in zip(left, far, strict=False):
        if bound is not None and not norm <= bound:
            said = f"NORM: |update - base| is {norm:.6g}, max_update_norm is {bound:.6g}"
            case.verdict = Verdict(case.update, UpdateState.QUARANTINED, said)
    if least is None:
        return
    every = [*left, *compared]
    kept = [index for index, case in enumerate(every) if case.verdict is None]
    for index, cosine in zip(kept, cosines(gram[kept][:, kept]), strict=True):
        if index >= len(left):
            continue
        if math.isinf(far[index]):
            said = "NORM: |update - base| is too large to be compared"
            every[index].verdict = Verdict(every[index].update, UpdateState.QUARANTINED, said)
        elif cosine is not None and cosine < least:
            said = (
                f"COSINE: with the mean direction of the other updates of the round it is {cosine:.4f}, "
                f"quarantine_cosine is {least:.4f}"
            )
            every[index].verdict = Verdict(every[index].update, UpdateState.QUARANTINED, said)


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
    return all(counted)


def _discard(blobs: list[Blob]) -> None:
    for blob in blobs:
        blob_discard(blob=blob)  # unless it has a row
