"""Wakes the long-polls of this process when something has changed for a user."""

import threading
from collections.abc import Iterable

from django.db import transaction

_condition = threading.Condition()
_generation = 0


def publish(user_ids: Iterable[str]) -> None:
    """Wake these users' long-polls once the transaction has committed."""
    transaction.on_commit(wake_all)


def wake_all() -> None:
    """Wake every long-poll of this process."""
    global _generation
    with _condition:
        _generation += 1
        _condition.notify_all()
