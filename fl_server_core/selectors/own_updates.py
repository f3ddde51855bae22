"""What became of a participant's own updates, for clients that remember something between rounds."""

import uuid
from dataclasses import dataclass
from enum import Enum, auto

from django.db.models import BooleanField, ExpressionWrapper, Q
from django.db.models.functions import Coalesce

from fl_server_core.lifecycle import RoundPhase, TaskKind, TrainingState, UpdateState
from fl_server_core.models import LocalModel, Task, Training

TOLD = 100  # of the rounds with an update that no model holds the newest, and of those that it was asked in
# Of an update in quarantine: nothing that anybody decides can make it count any more.
OVER = (
    Q(training__state__in=[TrainingState.COMPLETED, TrainingState.CANCELLED])
    | Q(round__result_version__isnull=False)
    | Q(round__phase__in=[RoundPhase.SKIPPED, RoundPhase.DONE])
)


class _Fate(Enum):
    """What became of an update."""

    USED = auto()
    OPEN = auto()
    GONE = auto()


@dataclass(frozen=True)
class OwnUpdates:
    """Rounds of a participant, ascending: what it did there is in no model and never will be; or may be yet."""

    unused: list[int]
    undecided: list[int]


def own_updates(*, training: Training, owner: uuid.UUID, before: int) -> OwnUpdates:
    """Of rounds below `before` that it began; of all that are not named the update has been used.

    Who was refused and has sent another one for the round is as that one is. Who was asked and of whom there is
    nothing has not sent it, or it was lost; if it arrives late after all, the next task says so. Older ones than `TOLD` are not named: whoever works one task off
    knows what was said until then.
    """
    if not before:
        return OwnUpdates([], [])
    asked = _asked(training, owner, before)
    mine = LocalModel.objects.filter(training=training, owner=owner).order_by()
    mine = mine.annotate(
        answered=Coalesce("trained_in__number", "round__number"),
        over=ExpressionWrapper(OVER, output_field=BooleanField()),
    ).filter(answered__lt=before)
    found: dict[int, set[_Fate]] = {}
    told = mine.filter(~Q(state=UpdateState.CONSUMED) | Q(answered__in=asked))
    for state, number, over in told.values_list("state", "answered", "over"):
        found.setdefault(number, set()).add(_fate(state, over))
    missed = [number for number, fates in found.items() if fates != {_Fate.USED}]
    newest = sorted({*sorted(missed)[-TOLD:], *asked})
    vain = [number for number in newest if found.get(number, set()) <= {_Fate.GONE}]
    older = [number for number in vain if number not in asked]
    used = set[int]()
    if older:
        again = mine.filter(state=UpdateState.CONSUMED, answered__in=older)
        used = set(again.values_list("answered", flat=True))
    return OwnUpdates(
        unused=[number for number in vain if number not in used],
        undecided=[number for number in newest if _Fate.OPEN in found.get(number, set())],
    )


def _asked(training: Training, owner: uuid.UUID, before: int) -> set[int]:
    """The newest rounds of which it got the task, that it may have begun it."""
    tasks = Task.objects.filter(
        round__training=training, user=owner, kind=TaskKind.TRAIN, number__lt=before
    )
    # Asked again: not told yet.
    begun = tasks.exclude(fetched_at=None, attempt=1).order_by("-number")
    return set(begun.values_list("number", flat=True)[:TOLD])


def _fate(state: str, over: bool) -> _Fate:
    if state == UpdateState.CONSUMED:
        return _Fate.USED
    gone = state == UpdateState.REFUSED or (state == UpdateState.QUARANTINED and over)
    return _Fate.GONE if gone else _Fate.OPEN
