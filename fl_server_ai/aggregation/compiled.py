"""Whether the compiled loops (`kernels.py`) can be had: numba is an optional part, the same bytes come without it."""

import logging
from collections.abc import Sequence
from types import ModuleType

import numpy as np
import numpy.typing as npt

from fl_server_ai.aggregation.blocks import Source

WORTH = 2**23  # numbers; for fewer, torch is done sooner than numba is loaded
_loaded: list[ModuleType] = []
log = logging.getLogger(__name__)


def prepare(numbers: int) -> None:
    """Load the loops if there are that many numbers to combine; from then on they are used for all.

    Takes most of a second, and some seconds more where they have never been compiled. Does nothing without numba
    (`pip install 'fl-server[fast]'`), and when called again.
    """
    if _loaded or numbers < WORTH:
        return
    try:
        import numba  # noqa: F401
    except ModuleNotFoundError:
        return
    except ImportError as error:  # there, but made for another NumPy
        log.warning("numba can't be used, aggregation is slower without it: %s", error)
        return
    from fl_server_ai.aggregation import kernels as found

    _loaded.append(found)


def kernels() -> ModuleType | None:
    """The module of compiled loops once it is loaded."""
    return _loaded[0] if _loaded else None


def descriptors(sources: Sequence[Source]) -> npt.NDArray[np.intc] | None:
    """The sources' open files; None if there is one that is opened for each read."""
    found = [source.fd for source in sources]
    return None if None in found else np.array(found, dtype=np.intc)
