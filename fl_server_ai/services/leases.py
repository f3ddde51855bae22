"""Work keeps its row as long as its worker lives."""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from django.conf import settings
from django.db import DatabaseError, connection

log = logging.getLogger("fl.celery")


@contextmanager
def lease_kept(renew: Callable[[], bool]) -> Iterator[None]:
    """Call `renew` three times a lease while the work goes on, until it says no; a dead worker stops."""
    stop = threading.Event()

    def run() -> None:
        while not stop.wait(settings.FL_LEASE_SECONDS / 3):
            try:
                if not renew():
                    return
            except DatabaseError as error:  # tried again in a moment; publishing is fenced anyway
                log.warning("a lease was not renewed: %s", error)
            finally:
                connection.close()

    thread = threading.Thread(target=run, daemon=True, name="lease")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
