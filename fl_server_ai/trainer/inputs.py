"""What a round's aggregation is made of: its updates and their files, as the engine takes them."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from fl_server_ai.aggregation import RoundFacts, UpdateMeta
from fl_server_ai.aggregation.engine import Inputs, UpdateFile
from fl_server_ai.services.chaining import weight_of
from fl_server_ai.services.training_options import TrainerOptions, strategy_of
from fl_server_ai.trainer.intact import (
    Stamp,
    UpdatesLost,
    faults_of,
    files_of,
    model_damaged,
    stamp_of,
    watched,
)
from fl_server_core.lifecycle import UpdateState
from fl_server_core.models import Blob, LocalModel, ModelVersion, Round, Training
from fl_server_core.services.chains import chain_models
from fl_server_core.storage import local_path


def updates_of(training: Training, round: Round, options: TrainerOptions) -> list[LocalModel]:
    """What is averaged: the round's updates, or in a daisy chain the newest of every chain."""
    if options.daisy_chain_period:
        return chain_models(training)
    accepted = LocalModel.objects.filter(round=round, state=UpdateState.ACCEPTED)
    related = ("blob", "extras", "mask", "round", "trained_in__base_version__blob")
    return list(accepted.select_related(*related).order_by("owner_id"))


def participant_of(update: LocalModel, options: TrainerOptions) -> str:
    """The name of the update within the round. One participant may have left two chains: in the order of rounds."""
    if options.daisy_chain_period:
        return f"{update.owner_id}/{update.round.number:010}"
    return str(update.owner_id)


def base_of(round: Round) -> ModelVersion:
    """The version that the round started from, with its files."""
    return ModelVersion.objects.select_related("blob", "strategy_state").get(
        pk=round.base_version_id
    )


@contextmanager
def opened_inputs(
    training: Training,
    round: Round,
    updates: Sequence[LocalModel],
    options: TrainerOptions,
    *,
    since: datetime | None = None,
) -> Iterator[Inputs]:
    """Paths to read all files at, as long as the block lasts; they are those that were accepted.

    `UpdatesLost` where an update's are not, `AggregationException` where the model's own are not; also while
    the block reads them. What was looked at `since` then is looked at again only if it was touched later.
    """
    base = base_of(round)
    strategy = strategy_of(training)
    strategy.facts = _facts(training, round)
    with ExitStack() as stack:
        paths = _Paths(stack)
        for update in updates:
            for blob in files_of(update):
                paths.open(blob, update)
        own = (base.blob, base.strategy_state, *map(_start, updates))
        models = [model for model in own if model is not None]
        for model in models:
            paths.open(model, None)
        paths.check(since)
        stack.enter_context(
            watched(updates, lambda update: participant_of(update, options), models)
        )
        yield Inputs(
            base=paths.of(base.blob),
            updates=[
                UpdateFile(
                    paths[update.blob],
                    _meta(update, options),
                    update.blob.digest,
                    extras=paths.of(update.extras),
                    mask=paths.of(update.mask),
                    tensors=None if update.tensors is None else frozenset(update.tensors),
                    start=paths.of(_start(update)),
                )
                for update in updates
                if update.blob is not None
            ],
            strategy=strategy,
            state_in=paths.of(base.strategy_state),
            buffer_policy=options.buffer_policy,
        )
        paths.check_again()


class _Paths:
    """Where the files of blobs can be read, and whose they are."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._found: dict[int, tuple[Blob, Path, LocalModel | None]] = {}
        self._seen: dict[int, Stamp] = {}
        self._lost: list[tuple[LocalModel | None, str]] = []

    def open(self, blob: Blob, owner: LocalModel | None) -> None:
        if blob.pk in self._found:
            return
        try:
            path = self._stack.enter_context(local_path(blob))
        except FileNotFoundError:  # of a storage without paths
            self._lost.append((owner, "its file has disappeared"))
        else:
            self._found[blob.pk] = blob, path, owner

    def check(self, since: datetime | None) -> None:
        self._seen = {key: stamp_of(path) for key, (_, path, _) in self._found.items()}
        self._look(list(self._found), since=since)

    def check_again(self) -> None:
        """What has changed since `check`; whoever read it in between may have come before or after."""
        changed = [key for key, seen in self._seen.items() if stamp_of(self._found[key][1]) != seen]
        self._look(changed, always=True)

    def _look(self, keys: Sequence[int], **how: Any) -> None:
        found = [self._found[key] for key in keys]
        faults = faults_of([(blob, path) for blob, path, _ in found], **how)
        pairs = zip(found, faults, strict=True)
        self._lost += [(owner, fault) for (_, _, owner), fault in pairs if fault]
        for owner, fault in self._lost:
            if owner is None:
                raise model_damaged(fault)
        lost = {owner.pk: (owner, fault) for owner, fault in self._lost if owner is not None}
        if lost:
            raise UpdatesLost(list(lost.values()))

    def __getitem__(self, blob: Blob) -> Path:
        return self._found[blob.pk][1]

    def of(self, blob: Blob | None) -> Path | None:
        return None if blob is None else self[blob]


def plan_of(
    training: Training, round: Round, updates: Sequence[LocalModel], options: TrainerOptions
) -> str:
    """SHA-256 over all that the result depends on: slices of one plan belong together."""
    base = base_of(round)
    state = base.strategy_state.digest if base.strategy_state else None
    said: list[object] = [training.aggregation_method, training.options, base.blob.digest, state]
    said.append(vars(_facts(training, round)))
    for update in updates:
        blobs = (update.blob, update.extras, update.mask, _start(update))
        said.append([blob.digest if blob else None for blob in blobs])
        said.append([vars(_meta(update, options)), update.tensors])
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _meta(update: LocalModel, options: TrainerOptions) -> UpdateMeta:
    return UpdateMeta(
        participant=participant_of(update, options),
        num_examples=weight_of(options, update),
        num_steps=update.num_steps,
        extras=update.numbers,
        staleness=update.staleness,
        discount=options.discount(update.staleness),
    )


def _facts(training: Training, round: Round) -> RoundFacts:
    return RoundFacts(
        number=round.number,
        rounds=training.target_num_updates,
        population=int(round.policy.get("population", 0)),
        actor=str(training.actor_id),
    )


def _start(update: LocalModel) -> Blob | None:
    """The model that a late update was trained from; None for the round's own."""
    if update.trained_in is None or not update.staleness:
        return None
    return update.trained_in.base_version.blob
