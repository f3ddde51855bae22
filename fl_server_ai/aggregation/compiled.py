"""Whether the compiled loops (`kernels.py`) can be had: numba is an optional part, the same bytes come without it.

But for distances, which are those of float64 with it and of float32 without (`distances.py`).
"""

import logging
from collections.abc import Sequence
from types import ModuleType

import numpy as np
import numpy.typing as npt

from fl_server_ai.aggregation.blocks import Source

WORTH = 2**23  # numbers; for fewer, torch is done sooner than numba is loaded
_loaded: list[ModuleType | None] = []  # what loading came to, once it was tried
log = logging.getLogger(__name__)


def prepare(numbers: int) -> None:
    """Load the loops if there are that many numbers to combine; from then on they are used for all.

    Takes most of a second, and some seconds more where they have never been compiled. Does nothing without numba
    (`pip install 'fl-server[fast]'`), and when called again.
    """
    if worth(numbers) and not _loaded:
        _loaded.append(_load())


def worth(numbers: int) -> bool:
    return numbers >= WORTH


def kernels() -> ModuleType | None:
    """The module of compiled loops once it is loaded."""
    return _loaded[0] if _loaded else None


def _load() -> ModuleType | None:
    try:
        import numba  # noqa: F401
    except ModuleNotFoundError:
        return None
    except ImportError as error:  # there, but made for another NumPy
        log.warning("numba can't be used, aggregation is slower without it: %s", error)
        return None
    from fl_server_ai.aggregation import kernels as found

    try:
        found.try_out()
    except Exception as error:  # noqa: BLE001 - whatever a compiler and its cache on disk may raise
        log.warning(
            "numba's loops can't be used, aggregation is slower without them (a cache on disk that is broken can be "
            "removed: *.nbi in __pycache__ or NUMBA_CACHE_DIR): %r",
            error,
        )
        return None
    return found


def descriptors(sources: Sequence[Source]) -> npt.NDArray[np.intc] | None:
    """The sources' open files; None if there is one that is opened for each read."""
    found = [source.fd for source in sources]
    return None if None in found else np.array(found, dtype=np.intc)
