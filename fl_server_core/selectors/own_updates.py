"""What became of a participant's own updates, for clients that remember something between rounds."""

import uuid
from collections import defaultdict
from dataclasses import dataclass

from django.db.models import BooleanField, ExpressionWrapper, Q
from django.db.models.functions import Coalesce

from fl_server_core.lifecycle import RoundPhase, TrainingState, UpdateState
from fl_server_core.models import LocalModel, Training

TOLD = 100  # rounds, the newest
# Of an update in quarantine: nothing that anybody decides can make it count any more.
OVER = (
    Q(training__state__in=[TrainingState.COMPLETED, TrainingState.CANCELLED])
    | Q(round__result_version__isnull=False)
    | Q(round__phase__in=[RoundPhase.SKIPPED, RoundPhase.DONE])
)


@dataclass(frozen=True)
class OwnUpdates:
    """Rounds that a participant has answered, ascending: in vain; and with what no model holds yet, and one may."""

    unused: list[int]
    undecided: list[int]


def own_updates(*, training: Training, owner: uuid.UUID, before: int) -> OwnUpdates:
    """Of rounds below `before`; all that are not named have been used, if they were answered.

    Who was refused and has sent another one for the round is as that one is.
    """
    if not before:
        return OwnUpdates([], [])
    mine = LocalModel.objects.filter(training=training, owner=owner).order_by()
    mine = mine.annotate(
        answered=Coalesce("trained_in__number", "round__number"),
        over=ExpressionWrapper(OVER, output_field=BooleanField()),
    ).filter(answered__lt=before)
    open_ones = mine.exclude(state=UpdateState.CONSUMED)
    found: dict[int, set[bool]] = defaultdict(set)
    for state, number, over in open_ones.values_list("state", "answered", "over"):
        gone = state == UpdateState.REFUSED or (state == UpdateState.QUARANTINED and over)
        found[number].add(gone)
    newest = sorted(found)[-TOLD:]
    vain = [number for number in newest if found[number] == {True}]
    again = mine.filter(state=UpdateState.CONSUMED, answered__in=vain)
    used = set(again.values_list("answered", flat=True)) if vain else set()
    return OwnUpdates(
        unused=[number for number in vain if number not in used],
        undecided=[number for number in newest if False in found[number]],
    )
