"""Which message is sent next: in order for each receiver, and those who answer before those who may not."""

from collections.abc import Collection, Iterable
from datetime import timedelta
from uuid import UUID

from django.db.models import Exists, F, OuterRef, QuerySet, Subquery
from django.utils import timezone

from fl_server_core.killpoints import around
from fl_server_core.lifecycle import NotificationState
from fl_server_core.models import Notification, User

# How long a message belongs to who is sending it; longer than a transport may take.
IN_FLIGHT = timedelta(seconds=30)
OBSOLETE = "obsolete"  # the error of a message that was not sent, as its task was over


def first_in_line() -> QuerySet[Notification]:
    """Queued messages that have nothing earlier before them for the same receiver and training."""
    earlier = Notification.objects.filter(
        training=OuterRef("training"),
        receiver=OuterRef("receiver"),
        id__lt=OuterRef("id"),
        state=NotificationState.QUEUED,
    )
    return Notification.objects.filter(~Exists(earlier), state=NotificationState.QUEUED)


def turns(away: Collection[UUID], *, threads: int, kept: int, most: int) -> list[tuple[int, UUID]]:
    """Messages to send now, `most` at most, as (message, receiver): one for each receiver that isn't away.

    `away` are the receivers that are being sent to, each by one of so many `threads`. Nobody knows whether
    those will answer who have never been told anything: they leave `kept` threads free for those who
    answered the last time. Who did not answer then leaves twice as many free.
    """
    due = first_in_line().filter(next_attempt_at__lte=timezone.now()).exclude(receiver__in=away)
    heads: dict[UUID, tuple[int, int]] = {}
    for pk, receiver, attempt in due.order_by("id").values_list("pk", "receiver_id", "attempt"):
        heads.setdefault(receiver, (pk, attempt))
    known = _doubts(heads)
    line = sorted(
        (2 if attempt else known.get(receiver, 1), pk, receiver)
        for receiver, (pk, attempt) in heads.items()
    )
    chosen: list[tuple[int, UUID]] = []
    for doubt, pk, receiver in line[:most]:
        if threads - kept * doubt - len(away) <= len(chosen):
            break
        chosen.append((pk, receiver))
    return chosen


def _doubts(receivers: Iterable[UUID]) -> dict[UUID, int]:
    """By receiver: 0 if it answered the last time, 1 if it was never told anything, 2 if it did not answer."""
    told = Notification.objects.filter(receiver=OuterRef("pk"))
    over = told.exclude(state=NotificationState.QUEUED).exclude(last_error=OBSOLETE)
    missed = told.filter(state=NotificationState.QUEUED).exclude(last_error="")
    known = User.objects.filter(pk__in=list(receivers)).annotate(
        last=Subquery(over.order_by("-id").values("state")[:1]), missed=Exists(missed)
    )
    return {
        pk: 2 if missed or last == NotificationState.FAILED else int(last is None)
        for pk, last, missed in known.values_list("pk", "last", "missed")
    }


def claim(pk: int) -> bool:
    """Take a message for one attempt, which is counted; False if somebody else has it."""
    now = timezone.now()
    due = Notification.objects.filter(
        pk=pk, state=NotificationState.QUEUED, next_attempt_at__lte=now
    )
    with around("message.claim"):
        return bool(due.update(attempt=F("attempt") + 1, next_attempt_at=now + IN_FLIGHT))
