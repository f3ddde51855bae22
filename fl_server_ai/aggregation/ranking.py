"""Ranks of the columns of a matrix in main memory, with NumPy's vector instructions and reused buffers.

Floats are compared as integers that sort as they do, so that -0 < +0 and every bit is kept. Few rows are
first compared as they are, which saves turning them: only zeros and NaN come out other than the integers
would, and where the result has any, the integers are asked.
"""

import threading
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.generic]
Comparison = tuple[int, int, bool, bool]  # two rows; are the smaller and the larger needed?
LINE = 65_536  # bytes of a row in a pass of the network: a dozen of them fit into a core's cache
COLUMNS = 4096  # of a pass of sorting; of many updates fewer
SORTED = 2 << 20  # bytes of such a pass, and as many beside them
BAND = 20  # rows that are transposed at a time

_kept = threading.local()


def scratch(name: str, shape: tuple[int, int], dtype: np.dtype[np.generic]) -> Array:
    """A buffer of this thread with anything in it, valid until the same name is asked for again."""
    nbytes = shape[0] * shape[1] * dtype.itemsize
    store: Array | None = getattr(_kept, name, None)
    if store is None or store.nbytes < nbytes:
        store = np.empty(nbytes, dtype=np.uint8)
        setattr(_kept, name, store)
    return store[:nbytes].view(dtype).reshape(shape)


def turn(keys: Array) -> None:
    """A float's bits to the integer that sorts like it, and back: negative numbers are turned over."""
    bits = 8 * keys.itemsize
    flips = scratch("flips", (1, keys.size), keys.dtype).reshape(keys.shape)
    np.right_shift(keys, bits - 1, out=flips)
    np.bitwise_and(flips, 2 ** (bits - 1) - 1, out=flips)
    np.bitwise_xor(keys, flips, out=keys)


@lru_cache(maxsize=32)
def as_array(comparisons: tuple[Comparison, ...]) -> npt.NDArray[np.int32]:
    """(m, 2): which rows are compared, for loops that keep both ends."""
    return np.array([pair[:2] for pair in comparisons], dtype=np.int32).reshape(-1, 2)


def by_network(
    rows: Array, target: Array, comparisons: Sequence[Comparison], first: int, floats: bool
) -> None:
    """(n, width) integers, the bits of floats, to (k, width): the ranks from `first` on.

    `floats`: they are float32 or float64, and may be compared as such.
    """
    step = LINE // rows.itemsize
    for start in range(0, rows.shape[1], step):
        part, out = rows[:, start : start + step], target[:, start : start + step]
        if floats:
            kind = np.dtype(f"f{rows.itemsize}")
            ends = _compare(part.view(kind), comparisons)
            for line, end in zip(out, ends[first : first + len(out)], strict=True):
                np.copyto(line.view(kind), end)
            if not _ambiguous(part, out.view(kind)):
                continue
        keys = scratch("keys", part.shape, part.dtype)
        np.copyto(keys, part)
        turn(keys)
        ends = _compare(keys, comparisons)
        np.copyto(out, ends[first : first + len(out)])
        turn(out)


def _ambiguous(rows: Array, ranks: Array) -> bool:
    """Whether NaN or zeros of both signs may have made other bits than a sort of all bits does."""
    if np.isnan(ranks[0]).any():  # one NaN in a column makes all its ranks NaN
        return True
    lowest = -(2 ** (8 * rows.itemsize - 1))  # the bits of -0
    return bool((ranks == 0).any() and (rows == lowest).any())


def _compare(rows: Array, comparisons: Sequence[Comparison]) -> list[Array]:
    """The rows after all comparisons; those that are not needed hold anything."""
    lines: list[Array] = list(rows)
    free: list[Array] = list(scratch("lines", (len(rows) + 1, rows.shape[1]), rows.dtype))
    owned = [False] * len(lines)
    for a, b, smaller, larger in comparisons:
        x, y = lines[a], lines[b]
        if smaller:
            lines[a] = np.minimum(x, y, out=free.pop())
        if larger:
            # Where it stands in a buffer, in place: both are read for the last time.
            lines[b] = np.maximum(x, y, out=x if owned[a] else y if owned[b] else free.pop())
        kept = lines[b] if larger else None
        free += [line for line, mine in ((x, owned[a]), (y, owned[b])) if mine and line is not kept]
        owned[a], owned[b] = smaller, larger
    return lines


def by_sorting(rows: Array, target: Array, first: int) -> None:
    """The same by sorting each column whole: with vector instructions that is faster than to select."""
    n, width = rows.shape
    step = max(16, min(COLUMNS, SORTED // (n * rows.itemsize)))
    for start in range(0, width, step):
        part, out = rows[:, start : start + step], target[:, start : start + step]
        columns = scratch("columns", (part.shape[1], n), rows.dtype)
        for top in range(0, n, BAND):
            columns[:, top : top + BAND] = part[top : top + BAND].T
        turn(columns)
        columns.sort(axis=1)
        np.copyto(out, columns[:, first : first + len(out)].T)
        turn(out)


def mean_over(rows: Array, mean: npt.NDArray[np.float64]) -> None:
    """(k, width), sorted in each column, to (width,): added in the order of the rows, alike ones kept.

    NumPy adds in that order for two columns and more; one alone it would add in pairs.
    """
    k, width = rows.shape
    if width == 1:
        two = np.empty(2)
        mean_over(rows.repeat(2, axis=1), two)
        mean[0] = two[0]
        return
    with np.errstate(over="ignore", invalid="ignore"):  # the caller looks at that
        for start in range(0, width, 4 * COLUMNS):
            part, out = rows[:, start : start + 4 * COLUMNS], mean[start : start + 4 * COLUMNS]
            np.add.reduce(part, axis=0, dtype=np.float64, out=out)
            out /= k
            if rows.itemsize == 8 or (out == 0).any():  # else sums of what is alike are exact
                np.copyto(out, part[0], where=part[0] == part[-1])
