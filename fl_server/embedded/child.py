"""The warm child: imports torch, then processes the events whose ids come in; `python -m` starts it.

Lines of JSON in both directions. In: `{"run": 4711}`. Out: `{"ready": true}`, `{"done": 4711}`,
`{"wake": [user ids]}`, `{"hint": [task, [ids]]}`.
"""

import ctypes
import json
import logging
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable
from typing import IO, Any

log = logging.getLogger("fl.celery")
PR_SET_PDEATHSIG = 1


def event_worker() -> Callable[[int], None]:
    """What to do with an id; loads torch, once."""
    from fl_server_ai.trainer.working import event_work

    return event_work


def run(load: Callable[[], Callable[[int], None]]) -> None:
    """Work until the pipe closes; the parent's end, of whatever kind, ends this process at once."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then tells us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    answers = Answers()
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(sys.stdin.fileno(), todo), daemon=True).start()

    import django

    django.setup()
    from django.db import close_old_connections

    from fl_server_ai.dispatch import register_sender
    from fl_server_ai.notifications import wakeups

    register_sender("embedded", lambda task, ids: answers.send({"hint": [task, ids]}))
    wakeups.set_forwarder(lambda users: answers.send({"wake": users}))
    work = load()

    answers.send({"ready": True})
    while True:
        row_id = todo.get()
        close_old_connections()
        try:
            work(row_id)
        except Exception:  # the row keeps its lease until it expires; then it is tried again
            log.exception("work %s failed before it could be released", row_id)
        close_old_connections()
        answers.send({"done": row_id})


class Answers:
    """The way back. Whatever prints to stdout goes to stderr instead, so that lines stay whole."""

    def __init__(self) -> None:
        self._out: IO[str] = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        self._lock = threading.Lock()

    def send(self, message: dict[str, Any]) -> None:
        with self._lock:
            self._out.write(json.dumps(message) + "\n")
            self._out.flush()


def _read(fd: int, todo: queue.SimpleQueue[int]) -> None:
    with os.fdopen(fd, encoding="utf-8") as lines:
        for line in lines:
            todo.put(json.loads(line)["run"])
    os._exit(0)  # also in the middle of work: whatever isn't committed is done again


if __name__ == "__main__":
    run(event_worker)
