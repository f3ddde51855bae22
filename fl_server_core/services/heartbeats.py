"""Slow is not dead: how long a phase lasts for participants who say how far they are."""

from collections.abc import Iterable
from datetime import datetime, timedelta

LONGEST_SILENCE = timedelta(minutes=2)


def phase_end(
    *, deadline: datetime, asked_at: datetime, heartbeats: Iterable[datetime], extends: float
) -> datetime:
    """When a phase with this deadline is over, given the latest progress report of each part that is open.

    Who reported lately is waited for past the deadline: until nothing has been heard for a quarter of the
    phase (two minutes at most), and no longer than `extends` times the phase.
    """
    span = max(deadline - asked_at, timedelta())
    silence = min(span / 4, LONGEST_SILENCE)
    alive = max((beat + silence for beat in heartbeats), default=deadline)
    return max(deadline, min(alive, deadline + extends * span))
