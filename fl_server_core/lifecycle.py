"""The legal states of everything that moves, and `move()`, the only writer of a state."""

from collections.abc import Iterable, Mapping
from typing import Any

from django.db import models

from fl_server_core.exceptions import IllegalMove


class TrainingState(models.TextChoices):
    """One-letter codes are part of the wire contract."""

    INITIAL = "I", "initial"
    ONGOING = "O", "ongoing"
    SWAG_ROUND = "S", "SWAG round"
    PAUSED = "P", "paused"
    COMPLETED = "C", "completed"
    CANCELLED = "X", "cancelled"
    ERROR = "E", "error"


class RoundPhase(models.TextChoices):
    """Where a round stands; `aggregating` and later no longer accept updates.

    A skipped round had too few: the model stays as it is, the number of the round moves on.
    """

    NOTIFYING = "notifying"
    COLLECTING = "collecting"
    AGGREGATING = "aggregating"
    SWAG = "swag"
    TESTING = "testing"
    DONE = "done"
    SKIPPED = "skipped"
    FAILED = "failed"


class TaskState(models.TextChoices):
    """What became of one participant's part in a round."""

    OPEN = "open"
    DONE = "done"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLED = "cancelled"


class TaskKind(models.TextChoices):
    """What a participant is asked to do."""

    TRAIN = "train"
    EVALUATE = "evaluate"
    SWAG = "swag"
    INITIAL_WEIGHTS = "initial_weights"


class UpdateState(models.TextChoices):
    """The life of one uploaded update; its file may be deleted once it is consumed."""

    RECEIVED = "received"
    ACCEPTED = "accepted"
    REFUSED = "refused"
    QUARANTINED = "quarantined"
    CONSUMED = "consumed"


class EventState(models.TextChoices):
    """The life of one piece of durable work."""

    PENDING = "pending"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


class NotificationState(models.TextChoices):
    """The life of one webhook message."""

    QUEUED = "queued"
    DELIVERED = "delivered"
    REJECTED = "rejected"
    FAILED = "failed"


T, R, U = TrainingState, RoundPhase, UpdateState
MOVES: Mapping[type[models.TextChoices], Mapping[str, frozenset[str]]] = {
    TrainingState: {
        T.INITIAL: frozenset({T.ONGOING, T.CANCELLED}),
        T.ONGOING: frozenset({T.SWAG_ROUND, T.PAUSED, T.COMPLETED, T.CANCELLED, T.ERROR}),
        T.SWAG_ROUND: frozenset({T.ONGOING, T.PAUSED, T.CANCELLED, T.ERROR}),
        T.PAUSED: frozenset({T.ONGOING, T.SWAG_ROUND, T.CANCELLED, T.ERROR}),
        T.COMPLETED: frozenset(),
        T.CANCELLED: frozenset(),
        T.ERROR: frozenset({T.ONGOING, T.SWAG_ROUND}),  # by a retry
    },
    RoundPhase: {
        R.NOTIFYING: frozenset({R.COLLECTING, R.AGGREGATING, R.SKIPPED, R.FAILED}),
        R.COLLECTING: frozenset({R.AGGREGATING, R.SKIPPED, R.FAILED}),
        # Back to collecting: updates were lost.
        R.AGGREGATING: frozenset({R.COLLECTING, R.SWAG, R.TESTING, R.DONE, R.FAILED}),
        R.SWAG: frozenset({R.TESTING, R.DONE, R.FAILED}),
        R.TESTING: frozenset({R.DONE, R.FAILED}),
        R.DONE: frozenset(),
        R.SKIPPED: frozenset({R.TESTING, R.DONE, R.FAILED}),  # only of the last round
        # By a retry, to where it failed.
        R.FAILED: frozenset({R.COLLECTING, R.AGGREGATING, R.SWAG, R.TESTING}),
    },
    TaskState: {
        TaskState.OPEN: frozenset(
            {TaskState.DONE, TaskState.FAILED, TaskState.EXPIRED, TaskState.CANCELLED}
        ),
        # Its update was looked at, and is in quarantine, or refused; or its file was lost.
        TaskState.DONE: frozenset({TaskState.CANCELLED, TaskState.FAILED}),
        TaskState.FAILED: frozenset({TaskState.OPEN}),  # asked again if it is to have it after all
        TaskState.EXPIRED: frozenset({TaskState.OPEN}),
        # The last two: its update is released from quarantine, or refused.
        TaskState.CANCELLED: frozenset({TaskState.OPEN, TaskState.DONE, TaskState.FAILED}),
    },
    UpdateState: {
        U.RECEIVED: frozenset({U.ACCEPTED, U.REFUSED, U.QUARANTINED}),
        # Of a skipped round: they wait for the next one, or are refused where no late ones count.
        U.ACCEPTED: frozenset({U.CONSUMED, U.RECEIVED, U.REFUSED}),
        U.REFUSED: frozenset(),
        U.QUARANTINED: frozenset({U.ACCEPTED, U.REFUSED}),
        U.CONSUMED: frozenset(),
    },
    EventState: {
        EventState.PENDING: frozenset({EventState.RUNNING, EventState.FAILED}),
        EventState.RUNNING: frozenset({EventState.PENDING, EventState.DONE, EventState.FAILED}),
        EventState.DONE: frozenset(),
        EventState.FAILED: frozenset({EventState.PENDING}),  # by a retry
    },
    NotificationState: {
        NotificationState.QUEUED: frozenset(
            {
                NotificationState.DELIVERED,
                NotificationState.REJECTED,
                NotificationState.FAILED,
            }
        ),
        NotificationState.DELIVERED: frozenset(),
        NotificationState.REJECTED: frozenset(),
        NotificationState.FAILED: frozenset(),
    },
}
TERMINAL_TRAINING_STATES = frozenset(
    {TrainingState.COMPLETED, TrainingState.CANCELLED, TrainingState.ERROR}
)
OPEN_PHASES = frozenset({RoundPhase.NOTIFYING, RoundPhase.COLLECTING})


def move_all(rows: Iterable[models.Model], to: models.TextChoices, **fields: Any) -> None:
    """Move many rows of one model at once, all or, by `IllegalMove`, none: call it in a transaction."""
    by_state: dict[str, list[models.Model]] = {}
    for row in rows:
        by_state.setdefault(getattr(row, getattr(row, "STATE_FIELD", "state")), []).append(row)
    for state, group in by_state.items():
        kind, name = type(group[0]), getattr(group[0], "STATE_FIELD", "state")
        if to.value not in MOVES[type(to)][type(to)(state)]:
            move(group[0], to)  # raises, and says which
        found = kind._default_manager.filter(pk__in=[row.pk for row in group], **{name: state})
        if found.update(**{name: to.value}, **fields) != len(group):
            raise IllegalMove(f"some {kind.__name__.lower()} has moved by now", state=state)


def move(row: models.Model, to: models.TextChoices, **fields: Any) -> None:
    """Move `row` to a new state and set `fields` with it, or raise `IllegalMove`.

    The update is conditional on the state that `row` was read with: when two processes race, the row count
    decides, and the loser gets `IllegalMove` with the state that it finds.
    """
    name = getattr(row, "STATE_FIELD", "state")
    state = getattr(row, name)
    if to.value not in MOVES[type(to)][type(to)(state)]:
        raise IllegalMove(
            f"{type(row).__name__.lower()} {row.pk} is {type(to)(state).label}, "
            f"it can't become {to.label}",
            state=state,
        )
    manager = type(row)._default_manager
    changed = manager.filter(pk=row.pk, **{name: state}).update(**{name: to.value}, **fields)
    if not changed:
        found = manager.filter(pk=row.pk).values_list(name, flat=True).first()
        raise IllegalMove(f"{type(row).__name__.lower()} {row.pk} is {found} by now", state=found)
    for key, value in {name: to.value, **fields}.items():
        setattr(row, key, value)
