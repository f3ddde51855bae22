"""How many long-polls may wait in this process: a thread that waits is one that serves nobody else."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from django.conf import settings

EACH = 4  # polls of one user: a client has one, and some that it has given up are still held
SPARE = 50  # threads for everything else
_lock = threading.Lock()
_taken: Counter[str] = Counter()


def places() -> int:
    """Of FL_WEB_THREADS all but 50, yet never less than half."""
    threads = settings.FL_WEB_THREADS
    return max(threads // 2, threads - SPARE)


@contextmanager
def place(user_id: str) -> Iterator[bool]:
    """Hold a place for as long as the block; False if this user or everybody together has too many."""
    with _lock:
        granted = _taken[user_id] < EACH and _taken.total() < places()
        if granted:
            _taken[user_id] += 1
    try:
        yield granted
    finally:
        if granted:
            with _lock:
                _taken[user_id] -= 1
                if not _taken[user_id]:
                    del _taken[user_id]
