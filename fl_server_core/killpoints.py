"""Named places where tests kill a process: around each commit, rename, message and answer.

Without effect unless `settings.FL_KILL_POINTS` names a folder. No settings module that is shipped can be told to:
only those of `tests/system/faults` set it. docs/explanation/crash-safety.md says what a kill at each place costs.
"""

import fcntl
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.db import transaction

COMMITS = (
    "model.create", "training.create", "training.start", "update.accept", "metrics.accept", "moments.accept",
    "question.ask", "round.publish", "chain.step", "moments.publish", "metrics.mean", "event.finish",
    "question.finish", "upload.create", "round.deadline", "round.collect", "round.extend", "task.fail",
    "event.give_up", "training.pause", "training.resume", "training.cancel", "training.retry",
    "training.delete", "clients.add", "clients.remove", "client.join", "initial.accept",
    "statistics.want", "statistics.store", "updates.judge", "update.release", "update.refuse",
    "slices.plan", "slice.finish", "updates.lost",
)  # fmt: skip
# One statement, one message, one file or one answer.
STEPS = (
    "file.rename", "event.claim", "question.claim", "message.claim", "message.send", "message.settle",
    "hint.event", "hint.messages", "hint.question", "hint.slices", "slice.claim", "wake", "blob.discard", "blob.delete", "sweep",
    "answer.model", "answer.training", "answer.start", "answer.update", "answer.metrics", "answer.moments",
    "answer.question", "answer.task", "answer.upload", "answer.piece", "upload.append", "upload.finish",
    "upload.used", "answer.join", "answer.control", "answer.failure", "answer.clients",
    "answer.calibration", "answer.decision",
)  # fmt: skip
BETWEEN = (
    "upload.staged", "file.synced", "blob.delete:file", "aggregation.written", "moments.written",
    "question.answered", "state.written", "round.skip", "update.adopt", "report.judged", "updates.judged",
    "slice.written",
)  # fmt: skip
POINTS = frozenset(
    [f"{step}.commit:{side}" for step in COMMITS for side in ("before", "after")]
    + [f"{step}:{side}" for step in STEPS for side in ("before", "after")]
    + [*BETWEEN]
)
_book: tuple[int, int] | None = None  # process id and the descriptor of its list of hits


def reached(point: str) -> None:
    """Count a hit of this point, and die if a test has armed it; nothing in any other process."""
    folder = settings.FL_KILL_POINTS
    if folder is None:
        return
    if point not in POINTS:
        raise KeyError(f"{point} is not declared in {__name__}")
    os.write(_hits(folder), f"{point}\n".encode())
    trap = folder / "armed" / point
    if trap.exists():
        _step_on(folder, trap)


@contextmanager
def around(step: str) -> Iterator[None]:
    """`step:before` and, unless the block raises, `step:after`."""
    reached(f"{step}:before")
    yield
    reached(f"{step}:after")


@contextmanager
def committing(step: str) -> Iterator[None]:
    """`transaction.atomic()` with points before its end and after the outermost COMMIT."""
    with transaction.atomic():
        if settings.FL_KILL_POINTS is not None:
            # Registered first: it comes before the hints that the block sends on commit.
            transaction.on_commit(lambda: reached(f"{step}.commit:after"))
        yield
        reached(f"{step}.commit:before")


def refuse_in_production() -> None:
    """Raise `ImproperlyConfigured` for a settings module of this package that sets FL_KILL_POINTS."""
    module = str(settings.SETTINGS_MODULE)
    if settings.FL_KILL_POINTS is not None and module.startswith("fl_server."):
        raise ImproperlyConfigured(f"{module} sets FL_KILL_POINTS, which is for tests; remove it")


def _hits(folder: Path) -> int:
    """A file of this process alone; a write survives the process, if not the machine."""
    global _book
    pid = os.getpid()
    if _book is None or _book[0] != pid:  # also after a fork
        path = folder / "hits" / str(pid)
        new = not path.exists()
        _book = pid, os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        if new:
            os.write(_book[1], " ".join(sys.orig_argv).replace("\n", " ").encode() + b"\n")
    return _book[1]


def _step_on(folder: Path, trap: Path) -> None:
    """The file holds how many hits are let pass; whoever comes then renames it, durably, and dies."""
    try:
        file = trap.open("r+", encoding="ascii")
    except FileNotFoundError:
        return  # somebody else was first
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        left = int(file.read() or 0)
        if left > 0:
            file.seek(0)
            file.truncate()
            file.write(str(left - 1))
            file.flush()
            return
        try:
            trap.rename(folder / "fired" / f"{trap.name}@{os.getpid()}")
        except FileNotFoundError:
            return
        _die(folder / "fired")


def _die(record: Path) -> NoReturn:
    fd = os.open(record, os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(fd)
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable: SIGKILL is never late for its own process")
