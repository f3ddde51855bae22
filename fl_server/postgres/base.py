"""A connection takes a slot when it is opened and gives it back when it is closed, or lost by its thread."""

import threading
import weakref
from typing import Any

from django.conf import settings
from django.db.backends.postgresql import base
from django.db.utils import OperationalError

PATIENCE = 30.0  # seconds


class Slots:
    """So many at a time in this process."""

    def __init__(self, number: int, seconds: float = PATIENCE) -> None:
        self._number, self._seconds = number, seconds
        self._free = threading.Semaphore(number)

    def take(self) -> None:
        """Wait for a slot; `OperationalError` if none comes free in time."""
        if not self._free.acquire(timeout=self._seconds):
            said = f"all {self._number} connections of this process were in use for {self._seconds:.0f} s"
            raise OperationalError(said)

    def give_back(self) -> None:
        self._free.release()


SLOTS = Slots(settings.FL_DATABASE_CONNECTIONS)


class DatabaseWrapper(base.DatabaseWrapper):
    """Whoever waits for anything else than the database closes its connection first (`connection_release`)."""

    slots = SLOTS
    _given_back: Any = None

    def get_new_connection(self, conn_params: dict[str, Any]) -> Any:
        self.slots.take()
        try:
            made = super().get_new_connection(conn_params)
        except BaseException:
            self.slots.give_back()
            raise
        # Also if the thread ends without closing it. Called twice, it does nothing the second time.
        self._given_back = weakref.finalize(made, self.slots.give_back)
        self._given_back.atexit = False
        return made

    def _close(self) -> Any:
        try:
            return super()._close()  # type: ignore[misc]  # a hook of Django that its stubs leave out
        finally:
            if self._given_back is not None:
                self._given_back()
