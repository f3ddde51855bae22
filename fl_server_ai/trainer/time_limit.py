"""An end to code of others, whatever it does; without torch."""

import faulthandler
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Never

STDERR = 2
AGAIN = 1.0  # second: a block that catches everything is interrupted once more


class TookTooLong(BaseException):
    """Not an `Exception`: code that catches those does not catch this."""


@contextmanager
def time_limited(seconds: float) -> Iterator[None]:
    """Raise `TookTooLong` in the block after so many seconds, and again until it ends.

    A block that never comes back to Python ends the process after twice that: its work is tried again as that of any
    lost worker, and then given up. Workers of both kinds work in their main thread; in another one nothing is done.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*_: object) -> Never:
        raise TookTooLong

    before = signal.signal(signal.SIGALRM, ring)
    faulthandler.dump_traceback_later(2 * seconds + AGAIN, exit=True, file=STDERR)
    signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)
