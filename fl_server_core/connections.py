"""Connections to the database are few: nobody keeps one while it waits for something else."""

import sqlite3

from django.db import OperationalError, connection

DISK_FULL = "53100"  # PostgreSQL's code


def connection_release() -> None:
    """Close this thread's connection, unless a transaction is open; the next query opens another."""
    if not connection.in_atomic_block:
        connection.close()


def database_full(error: Exception) -> bool:
    """Whether the database has no room on its disk, which is another thing than to be away."""
    cause = error.__cause__
    return isinstance(error, OperationalError) and (
        getattr(cause, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
        or getattr(cause, "pgcode", None) == DISK_FULL
    )
