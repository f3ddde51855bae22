"""Commits that do not wait for the disk: for work that nobody has been promised yet."""

from collections.abc import Iterator
from contextlib import contextmanager

from django.db import connection, transaction

NORMAL = 1  # SQLite's `synchronous`: the log is synced at checkpoints, not at each commit


@contextmanager
def unsynced() -> Iterator[None]:
    """A transaction that a killed process keeps, and a power cut may undo together with all later unsynced ones.

    The order of commits holds: any ordinary commit afterwards makes this one durable too. Within another
    transaction it is part of that one, and as durable as that.
    """
    if connection.in_atomic_block:
        with transaction.atomic():
            yield
    elif connection.vendor == "sqlite":
        with _synchronous(NORMAL), transaction.atomic():
            yield
    else:
        with transaction.atomic():
            if connection.vendor == "postgresql":
                with connection.cursor() as cursor:
                    cursor.execute("SET LOCAL synchronous_commit TO OFF")
            yield


@contextmanager
def _synchronous(level: int) -> Iterator[None]:
    with connection.cursor() as cursor:
        cursor.execute("PRAGMA synchronous")
        before = int(cursor.fetchone()[0])
        cursor.execute(f"PRAGMA synchronous={min(level, before)}")
    try:
        yield
    finally:
        with connection.cursor() as cursor:
            cursor.execute(f"PRAGMA synchronous={before}")
