"""From a round's stored updates to its published version; a round that moved on is left alone."""

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

from django.conf import settings
from django.utils import timezone

from fl_server_ai.aggregation.engine import Aggregated, aggregate
from fl_server_ai.aggregation.shared import write_shared
from fl_server_ai.services.chaining import weight_of
from fl_server_ai.services.training_options import TrainerOptions, strategy_of
from fl_server_ai.trainer.inputs import opened_inputs, updates_of
from fl_server_ai.trainer.slicing import slices_for, slices_joined
from fl_server_core.exceptions import AggregationException
from fl_server_core.killpoints import committing, reached
from fl_server_core.lifecycle import RoundPhase
from fl_server_core.models import (
    Blob,
    GlobalModel,
    LocalModel,
    ModelVersion,
    Round,
    TrainerEvent,
    Training,
)
from fl_server_core.models.trainings import UncertaintyMethod
from fl_server_core.services.blobs import (
    blob_discard,
    blob_store,
    blobs_doom_unreferenced,
)
from fl_server_core.services.chains import chain_consume
from fl_server_core.services.ensembles import members_replace
from fl_server_core.services.events import event_held
from fl_server_core.services.rounds import updates_consume
from fl_server_core.services.slices import slices_drop
from fl_server_core.services.trainings import participants_here, training_locked
from fl_server_core.storage import local_path, staging_path

log = logging.getLogger("fl.celery")


def aggregate_round(
    training: Training, round: Round, options: TrainerOptions, work: TrainerEvent | None
) -> None:
    """Aggregate the accepted updates and publish the result as the training's current version.

    The result depends on the updates alone, so a second worker that does the same makes the same bytes, but of what
    clients get beside it if somebody joined in between; the first one to commit publishes, the other's file is discarded. A large round is shared by
    all workers: `OthersAtWork` as long as they are at it. `UpdatesLost` if files are not what was accepted.
    """
    updates = updates_of(training, round, options)
    if not updates:
        raise AggregationException(f"round {round.number} has no accepted updates")
    started = timezone.now()
    out, state_out = staging_path(".safetensors"), staging_path(".state")
    try:
        slices = slices_for(work, updates)
        if work is not None and slices:
            result = slices_joined(training, round, updates, options, work, slices, out, state_out)
        else:
            result = _aggregate(training, round, updates, options, out, state_out)
        reached("aggregation.written")
        blobs = _Blobs(blob_store(source=out, digest=result.digest, size=result.size))
        try:
            if state_out.exists():  # only of strategies that remember something
                blobs.shared = _shared_blob(training, round, state_out)
                blobs.state = _state_blob(state_out)
                reached("state.written")
            published = _publish(training, round, updates, result, blobs, options, work)
        except BaseException:
            _discard(blobs.all)
            raise
    finally:
        out.unlink(missing_ok=True)
        state_out.unlink(missing_ok=True)
    if not published:
        _discard(blobs.all)
        return
    log.info(
        "training %s round %s: %s updates aggregated in %.2f s",
        training.pk,
        round.number,
        len(updates),
        (timezone.now() - started).total_seconds(),
    )


@dataclass
class _Blobs:
    """The unsaved rows of the files of one result."""

    weights: Blob
    state: Blob | None = None
    shared: Blob | None = None

    @property
    def all(self) -> list[Blob]:
        return [blob for blob in (self.weights, self.state, self.shared) if blob is not None]


def _shared_blob(training: Training, round: Round, state: Path) -> Blob | None:
    """What clients get of the state with their next task: means as of those who are in now.

    Who joins or leaves before that task counts a round later: the state itself has the round's own number.
    """
    strategy = strategy_of(training)
    if not strategy.shared:
        return None
    out = staging_path(".safetensors")
    here = participants_here(training).count() if strategy.population_means else 0
    try:
        with local_path(round.base_version.blob) as base:
            digest = write_shared(
                state=state, base=base, out=out, strategy=strategy, population=here
            )
        return blob_store(source=out, digest=digest, size=out.stat().st_size)
    finally:
        out.unlink(missing_ok=True)


def _state_blob(path: Path) -> Blob:
    with path.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    size = path.stat().st_size
    return blob_store(source=path, digest=digest, size=size, suffix=".state.safetensors")


def _discard(blobs: list[Blob]) -> None:
    for blob in blobs:
        blob_discard(blob=blob)


def _aggregate(
    training: Training,
    round: Round,
    updates: list[LocalModel],
    options: TrainerOptions,
    out: Path,
    state_out: Path,
) -> Aggregated:
    with opened_inputs(training, round, updates, options) as inputs:
        return aggregate(
            base=inputs.base,
            updates=inputs.updates,
            out=out,
            strategy=inputs.strategy,
            state_in=inputs.state_in,
            state_out=state_out,
            device=settings.FL_AGGREGATION_DEVICE,
            buffer_policy=inputs.buffer_policy,
        )


@committing("round.publish")
def _publish(
    training: Training,
    round: Round,
    updates: list[LocalModel],
    result: Aggregated,
    blobs: _Blobs,
    options: TrainerOptions,
    work: TrainerEvent | None,
) -> bool:
    training_locked(training.pk)
    current = Round.objects.get(pk=round.pk)
    if current.phase != RoundPhase.AGGREGATING or current.result_version_id is not None:
        return False
    if work is not None and not event_held(event=work):
        return False
    for blob in blobs.all:
        blob.save()
    version = ModelVersion.objects.create(
        model_id=training.model_id,
        number=round.number + 1,
        parent_id=round.base_version_id,
        blob=blobs.weights,
        strategy_state=blobs.state,
        shared=blobs.shared,
        scalars=result.scalars,
        strategy=training.aggregation_method,
        num_updates=len(updates),
        total_examples=sum(weight_of(options, update) for update in updates),
    )
    GlobalModel.objects.filter(pk=training.model_id).update(
        current_version=version, round=version.number
    )
    Round.objects.filter(pk=round.pk).update(
        result_version=version, warnings=[*current.warnings, *result.warnings]
    )
    if work is not None:
        slices_drop(event=work)
    Training.objects.filter(pk=training.pk).update(last_update=timezone.now())
    if training.uncertainty_method == UncertaintyMethod.ENSEMBLE:
        members_replace(training=training, updates=updates)
    delete = options.delete_local_models_after_aggregation
    if options.daisy_chain_period:
        chain_consume(training, delete=delete)
    _consume(updates, delete=delete)
    return True


def _consume(updates: list[LocalModel], *, delete: bool) -> None:
    blobs = updates_consume(updates, delete=delete)
    if blobs:
        blobs_doom_unreferenced(ids=blobs)
