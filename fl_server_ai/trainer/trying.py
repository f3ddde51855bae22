"""What becomes of work that fails: given back to be tried again, or given up with a reason."""

import errno
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from django.db import OperationalError

from fl_server_core.exceptions import AggregationException

log = logging.getLogger("fl.celery")
# What a full disk, a lost file server or too much else going on raise: waiting helps.
PASSING = {
    errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ESTALE,
    errno.ETIMEDOUT, errno.ENOTCONN, errno.EROFS,
}  # fmt: skip


class Release(Protocol):
    """Gives the claimed row back; `spent` counts a failure."""

    def __call__(self, *, error: str, spent: bool = True) -> bool: ...


@contextmanager
def tried(what: str, *, release: Release, give_up: Callable[[str], None]) -> Iterator[None]:
    """Raise nothing: whatever the block raises ends in one of the two. `what` is for the log."""
    try:
        yield
    except AggregationException as error:
        give_up(f"AGGREGATION_FAILED: {error}")
    except (OSError, OperationalError) as error:
        said = f"{type(error).__name__}: {error}"
        if not _passing(error):
            log.exception("%s failed", what)
            release(error=said)
            return
        log.warning("%s waits: %s", what, error)
        release(error=said, spent=False)
    except Exception as error:
        log.exception("%s failed", what)
        release(error=f"{type(error).__name__}: {error}")


def _passing(error: Exception) -> bool:
    """Whether the same may go well later, without anybody doing anything to the work."""
    if isinstance(error, OperationalError | ConnectionError | TimeoutError):
        return True
    return isinstance(error, OSError) and error.errno in PASSING
