"""Watching a training: a look whenever something may have changed, without a connection in between."""

import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

from django.db import connection

from fl_server_ai.notifications import wakeups
from fl_server_ai.services.places import STREAMS
from fl_server_core.lifecycle import TERMINAL_TRAINING_STATES, TaskKind
from fl_server_core.models import Training, User
from fl_server_core.selectors import trainings_visible_to
from fl_server_core.services.blocked import Blocked, blocked_on
from fl_server_core.services.rounds import current_round, round_tally

LOOK_SECONDS = 2.0


@dataclass(frozen=True)
class Look:
    """A training as it was a moment ago."""

    training: Training
    blocked: Blocked | None
    arrived: int
    expected: int
    ended: bool


def training_watch(
    *, training_id: uuid.UUID, user: User, seconds: float, stop: threading.Event
) -> Iterator[Look]:
    """Look at once, then every two seconds or when something happened to the user, for `seconds` in all.

    Ends early with the training, when the user may no longer see it, or when the server stops (`wakeups.stopped`).
    Where too many watch already (`places`), there is one look.
    """
    until = time.monotonic() + seconds
    with STREAMS.one(str(user.pk)) as granted:
        while True:
            seen = wakeups.generation(str(user.pk))
            with wakeups.gate:
                look = _look(training_id, user)
                if not connection.in_atomic_block:
                    connection.close()
            if look is None:
                return
            yield look
            left = until - time.monotonic()
            if look.ended or not granted or left <= 0 or stop.is_set():
                return
            wakeups.wait(str(user.pk), seen, min(left, LOOK_SECONDS), stop=stop)


def _look(training_id: uuid.UUID, user: User) -> Look | None:
    rows = trainings_visible_to(user).select_related("model__current_version")
    training = rows.filter(pk=training_id).first()
    if training is None:
        return None
    round = current_round(training)
    tally = round_tally(round, TaskKind.TRAIN) if round else None
    return Look(
        training,
        blocked_on(training=training, visible_to=user),
        tally.done if tally else 0,
        tally.done + tally.open if tally else 0,
        training.state in TERMINAL_TRAINING_STATES,
    )
