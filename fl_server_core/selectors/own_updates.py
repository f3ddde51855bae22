"""What became of a participant's own updates, for clients that remember something between rounds."""

from collections import defaultdict
from dataclasses import dataclass

from django.db.models import Q
from django.db.models.functions import Coalesce

from fl_server_core.lifecycle import RoundPhase, TrainingState, UpdateState
from fl_server_core.models import LocalModel, Training, User

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


def own_updates(*, training: Training, owner: User) -> OwnUpdates:
    """All others have been used. Who was refused and has sent another one for the round is as that one is."""
    mine = LocalModel.objects.filter(training=training, owner=owner)
    open_ones = mine.exclude(state=UpdateState.CONSUMED)
    lost = set(open_ones.filter(OVER, state=UpdateState.QUARANTINED).values_list("pk", flat=True))
    found: dict[int, set[str]] = defaultdict(set)
    answered = Coalesce("trained_in__number", "round__number")
    for pk, state, number in open_ones.order_by().values_list("pk", "state", answered):
        gone = pk in lost or state == UpdateState.REFUSED
        found[number].add("unused" if gone else "undecided")
    if not found:
        return OwnUpdates([], [])
    newest = sorted(found)[-TOLD:]
    again = [number for number in newest if found[number] == {"unused"}]
    counted = mine.filter(state=UpdateState.CONSUMED).annotate(_answered=answered)
    used = set(counted.filter(_answered__in=again).values_list("_answered", flat=True))
    return OwnUpdates(
        unused=[number for number in again if number not in used],
        undecided=[number for number in newest if "undecided" in found[number]],
    )
