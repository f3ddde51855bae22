"""How many may wait in this process, and how many of them may be one user's."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from django.conf import settings

EACH = 4  # polls of one user: a client has one, and some that it has given up are still held
SPARE = 50  # threads for everything else


class Places:
    """Places that are given back. `most` and `each` are asked every time: how many, and how many of one user."""

    def __init__(self, most: Callable[[], int], each: Callable[[], int] = lambda: EACH) -> None:
        self._most, self._each = most, each
        self._lock = threading.Lock()
        self._taken: Counter[str] = Counter()

    def take(self, user_id: str) -> bool:
        """Whether there was one."""
        with self._lock:
            granted = self._taken[user_id] < self._each() and self._taken.total() < self._most()
            if granted:
                self._taken[user_id] += 1
            return granted

    def give_back(self, user_id: str) -> None:
        with self._lock:
            self._taken[user_id] -= 1
            if self._taken[user_id] <= 0:
                del self._taken[user_id]

    def taken(self) -> int:
        """By everybody together."""
        with self._lock:
            return self._taken.total()

    @contextmanager
    def one(self, user_id: str) -> Iterator[bool]:
        """Hold a place for as long as the block; False if this user or everybody together has too many."""
        granted = self.take(user_id)
        try:
            yield granted
        finally:
            if granted:
                self.give_back(user_id)


def places() -> int:
    """Where who waits holds a thread: of FL_WEB_THREADS all but 50, yet never less than half."""
    threads = settings.FL_WEB_THREADS
    return max(threads // 2, threads - SPARE)


THREADS = Places(places)  # polls under a plain WSGI server
POLLS = Places(lambda: settings.FL_POLLS)  # polls under the front: a coroutine each
# A thread each, everywhere. Large bodies have three quarters of these: something must be left for downloads.
STREAMS = Places(lambda: (settings.FL_TRANSFER_THREADS + 7) // 8)
place = THREADS.one
