"""A process has so many connections, which go from thread to thread: making one costs PostgreSQL a process."""

import os
import select
import threading
import time
import weakref
from typing import Any

from django.conf import settings
from django.db.backends.postgresql import base
from django.db.utils import OperationalError

PATIENCE = 30.0  # seconds
KEPT = 4  # at most, for the next who want one
IDLE_SECONDS = 60.0  # longer than that, a firewall may have forgotten a connection
UNKNOWN = 4  # what libpq calls the state of a transaction on a connection that is broken


class Slots:
    """So many at a time in this process, those that are kept for the next included."""

    def __init__(self, number: int, seconds: float = PATIENCE) -> None:
        self._number, self._seconds = number, seconds
        self._lost: list[Any] = []
        self._begin()

    def _begin(self) -> None:
        self._free = threading.Semaphore(self._number)
        self._idle: list[tuple[str, float, Any]] = []

    def take(self) -> None:
        """Wait for a slot; `OperationalError` if none comes free in time."""
        if not self._free.acquire(timeout=self._seconds):
            said = f"all {self._number} connections of this process were in use for {self._seconds:.0f} s"
            raise OperationalError(said)

    def give_back(self) -> None:
        self._free.release()

    def kept(self, key: str) -> Any | None:
        """A connection with these parameters that was kept and lives; others are closed. The slot is taken."""
        while True:
            try:
                theirs, since, connection = self._idle.pop()
            except IndexError:
                return None
            if theirs == key and time.monotonic() - since < IDLE_SECONDS and _lives(connection):
                return connection
            connection.close()

    def keep(self, key: str, connection: Any) -> None:
        """Hand it to whoever comes next. The slot is given back after that."""
        if len(self._idle) >= KEPT:
            connection.close()
        else:
            self._idle.append((key, time.monotonic(), connection))

    def forked(self) -> None:
        """In a child: these are the parent's. They stay open here, as closing them would end them there."""
        self._lost += self._idle
        self._begin()


def _lives(connection: Any) -> bool:
    """A server that has ended the connection, or says anything unasked, makes its socket readable."""
    if connection.closed:
        return False
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLIN | select.POLLHUP)
    return not poll.poll(0)


def _clean(connection: Any) -> bool:
    """Whether the connection is fit for somebody else, after what was left open is rolled back."""
    if connection.closed or connection.info.transaction_status == UNKNOWN:
        return False
    try:
        connection.rollback()
    except connection.Error:
        return False
    return True


SLOTS = Slots(settings.FL_DATABASE_CONNECTIONS)
os.register_at_fork(after_in_child=SLOTS.forked)


class DatabaseWrapper(base.DatabaseWrapper):
    """Whoever waits for anything else than the database closes its connection first (`connection_release`)."""

    slots = SLOTS
    _given_back: Any = None
    _key = ""

    def get_new_connection(self, conn_params: dict[str, Any]) -> Any:
        self._key = repr(sorted(conn_params.items(), key=lambda item: item[0]))
        self.slots.take()
        try:
            made = self.slots.kept(self._key)
            if made is None:
                made = super().get_new_connection(conn_params)
        except BaseException:
            self.slots.give_back()
            raise
        # Also if the thread ends without closing it. Called twice, it does nothing the second time.
        self._given_back = weakref.finalize(made, self.slots.give_back)
        self._given_back.atexit = False
        return made

    def _close(self) -> Any:
        given_back, self._given_back = self._given_back, None
        if given_back is None:
            return super()._close()  # type: ignore[misc]  # a hook of Django that its stubs leave out
        try:
            if self.connection is not None and _clean(self.connection):
                self.slots.keep(self._key, self.connection)
                given_back.detach()
                self.slots.give_back()
                return None
            return super()._close()  # type: ignore[misc]
        finally:
            given_back()
