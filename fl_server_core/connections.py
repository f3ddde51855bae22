"""Connections to the database are few: nobody keeps one while it waits for something else."""

from django.db import connection


def connection_release() -> None:
    """Close this thread's connection, unless a transaction is open; the next query opens another."""
    if not connection.in_atomic_block:
        connection.close()
