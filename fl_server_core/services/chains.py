"""Daisy chains: which models are on their way, and who goes on with which of them.

Kamp, Fischer, Vreeken 2023, https://arxiv.org/abs/2110.03469. Callers hold the training's row lock.
"""

import random
import uuid
from collections.abc import Sequence
from typing import TypeVar

from fl_server_core.lifecycle import UpdateState
from fl_server_core.models import LocalModel, Training, User
from fl_server_core.services.blobs import blobs_doom_unreferenced
from fl_server_core.services.rounds import updates_consume

ItemT = TypeVar("ItemT")
OwnerT = TypeVar("OwnerT")
TRIES = 1_000  # to draw without fixed points: about one in three permutations has none


def chain_models(training: Training) -> list[LocalModel]:
    """The newest update of every chain since the last aggregation, by owner and round.

    Those of participants who have dropped out since are among them: nobody's work is lost.
    """
    accepted = LocalModel.objects.filter(training=training, state=UpdateState.ACCEPTED)
    continued = accepted.filter(continues__isnull=False).values("continues_id")
    return list(
        accepted.exclude(pk__in=continued)
        .select_related("blob", "extras", "mask", "round")
        .order_by("owner_id", "round__number")
    )


def chain_consume(training: Training, *, delete: bool) -> None:
    """Settle the updates that others have gone on from; `delete` gives their files up too."""
    alive = [update.pk for update in chain_models(training)]
    past = LocalModel.objects.filter(training=training, state=UpdateState.ACCEPTED)
    gone = list(past.exclude(pk__in=alive))
    blobs = updates_consume(gone, delete=delete)
    if blobs:
        blobs_doom_unreferenced(ids=blobs)


def chain_permute(
    training: Training, number: int, users: Sequence[User], *, no_fixed_points: bool
) -> dict[uuid.UUID, LocalModel | None]:
    """Who goes on with which model in round `number`: uniform, from the training's seed and the number.

    With more models than users some wait for the next draw, and then come first; with fewer, some users
    begin with the global model (None). `no_fixed_points`: nobody goes on with his own, where that is possible.
    """
    models = _not_waiting(training, number, chain_models(training), len(users))
    owned = [(update.owner_id, update) for update in models]
    takers = [user.pk for user in users]
    return chain_drawn(training.seed, number, takers, owned, no_fixed_points=no_fixed_points)


def _not_waiting(
    training: Training, number: int, models: list[LocalModel], places: int
) -> list[LocalModel]:
    """As many as there are places for: those that have waited longest, then any."""
    if len(models) <= places:
        return models
    waited = [update for update in models if update.round.number < number - 1]
    waited.sort(key=lambda update: update.round.number)
    fresh = [update for update in models if update.round.number >= number - 1]
    draw = random.Random(f"{training.seed}:{number}:waiting")  # noqa: S311 - repeatable, no secret
    draw.shuffle(fresh)
    return [*waited, *fresh][:places]


def chain_drawn(
    seed: int,
    number: int,
    takers: Sequence[OwnerT],
    owned: Sequence[tuple[OwnerT, ItemT]],
    *,
    no_fixed_points: bool,
) -> dict[OwnerT, ItemT | None]:
    """The draw of `chain_permute`, of models by their owners, for takers; without a database."""
    models: list[tuple[OwnerT, ItemT] | None] = list(owned)
    models += [None] * (len(takers) - len(models))
    draw = random.Random(f"{seed}:{number}")  # noqa: S311 - repeatable, and no secret
    for _ in range(TRIES if no_fixed_points else 1):
        draw.shuffle(models)
        pairs = list(zip(takers, models, strict=False))
        if not any(model is not None and model[0] == taker for taker, model in pairs):
            break
    return {taker: model and model[1] for taker, model in pairs}


def chain_continue(training: Training, users: Sequence[User]) -> dict[uuid.UUID, LocalModel | None]:
    """Everybody goes on with his own newest model.

    Who has none takes over one that nobody goes on with, in the order of owners; then the global model.
    """
    models = chain_models(training)
    own = {update.owner_id: update for update in models}
    taken = {user.pk: own.get(user.pk) for user in users}
    going = {update.pk for update in taken.values() if update is not None}
    waiting = iter([update for update in models if update.pk not in going])
    return {pk: update or next(waiting, None) for pk, update in taken.items()}
