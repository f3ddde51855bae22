"""What Celery beat and the default queue do elsewhere: sweeping, and delivering messages."""

import logging
import threading
from collections.abc import Callable

from django.conf import settings
from django.db import close_old_connections

from fl_server_ai.services.notifications import notifications_deliver
from fl_server_ai.services.reconciler import sweep

log = logging.getLogger("fl.server")


class Repeated:
    """Calls `work` at once, then whenever hinted and at least every `seconds`, in its own thread."""

    def __init__(self, name: str, work: Callable[[], object], seconds: float) -> None:
        self._work = work
        self._seconds = seconds
        self._due = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name=name)

    def start(self) -> None:
        self._thread.start()

    def hint(self) -> None:
        self._due.set()

    def stop(self, seconds: float = 2.0) -> None:
        self._stopping.set()
        self._due.set()
        self._thread.join(seconds)

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._due.clear()
            close_old_connections()
            try:
                self._work()
            except Exception:  # a busy database, a full disk: the next call may do better
                log.exception("%s failed; it is tried again", self._thread.name)
            finally:
                close_old_connections()
            self._due.wait(self._seconds)


def reconciler() -> Repeated:
    return Repeated("reconciler", sweep, settings.FL_SWEEP_SECONDS)


def notifier() -> Repeated:
    return Repeated("notifier", notifications_deliver, 1.0)
