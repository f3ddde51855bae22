"""The engine's innermost loops, compiled by numba: the bytes that torch and NumPy make, in a fraction of the time.

torch and NumPy do one operation at a time over a whole block, and each of them reads and writes memory. These do all that
there is to do with a number while it is in a register, read files straight into buffers that fit into a core's cache,
and hold no lock of the interpreter meanwhile. `compiled.py` says whether they can be had.
"""

import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
import numpy.typing as npt
from numba import types

Function = TypeVar("Function", bound=Callable[..., Any])
Float32s = npt.NDArray[np.float32]
Float64s = npt.NDArray[np.float64]

TILE = 32768  # numbers of an update that are read and added at a time
BESIDE = 4  # updates that are added at a time
LINE = 256  # columns that a network sorts at a time
CHUNK = 1024  # columns of which distances are taken at a time

_pread: Any = types.ExternalFunction(
    "pread", types.intp(types.intc, types.uintp, types.uintp, types.int64)
)


def compiled(function: Function, **options: Any) -> Function:
    """Compiled at the first call and kept on disk, where there is a folder for that; threads may share it."""
    options |= {"nogil": True, "error_model": "numpy"}
    try:
        made = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no folder that can be written
        made = numba.njit(**options)(function)
    return cast(Function, made)


@compiled
def read_rows(files: npt.NDArray[np.intc], offset: int, rows: npt.NDArray[np.uint8]) -> int:
    """Each file's bytes from `offset` on into its row; how many rows are whole: the next one's file was too short."""
    for k in range(len(files)):
        done = 0
        while done < rows.shape[1]:
            at = rows[k].ctypes.data + done
            got = _pread(files[k], at, rows.shape[1] - done, offset + done)
            if got <= 0:
                return k
            done += got
    return len(files)


@compiled
def add_up(
    files: npt.NDArray[np.intc],
    offset: int,
    weights: Float64s,
    divisor: float,
    unit: float,
    least: float,
    mean: Float64s,
    doubtful: npt.NDArray[np.int64],
) -> int:
    """Means of float32 from `offset` on, added in the files' order; -1 where a file could not be read.

    With a `unit` it is the number of those in `doubtful` that may be rounded wrongly: `exact.Doubt` says why.
    """
    n, found = len(files), 0
    rows = np.empty((BESIDE, TILE), np.float32)
    squares = np.empty(TILE, np.float32)
    for start in range(0, len(mean), TILE):
        length = min(TILE, len(mean) - start)
        total = mean[start : start + length]
        total[:] = -0.0  # 0 + -0 would be 0
        squares[:] = least
        for first in range(0, n, BESIDE):
            some = min(BESIDE, n - first)
            for k in range(some):
                at = offset + 4 * start
                if _pread(files[first + k], rows[k].ctypes.data, 4 * length, at) != 4 * length:
                    return -1
            if some == 4:
                a, b, c, d = rows[0], rows[1], rows[2], rows[3]
                by_a, by_b = weights[first], weights[first + 1]
                by_c, by_d = weights[first + 2], weights[first + 3]
                for i in range(length):
                    mine = total[i] + np.float64(a[i]) * by_a
                    mine = mine + np.float64(b[i]) * by_b
                    mine = mine + np.float64(c[i]) * by_c
                    total[i] = mine + np.float64(d[i]) * by_d
                    squares[i] += (a[i] * a[i] + b[i] * b[i]) + (c[i] * c[i] + d[i] * d[i])
            else:
                for k in range(some):
                    a, by_a = rows[k], weights[first + k]
                    for i in range(length):
                        total[i] += np.float64(a[i]) * by_a
                        squares[i] += a[i] * a[i]
        apart = 0
        for i in range(length):
            total[i] /= divisor
            off = np.float64(math.sqrt(squares[i])) * unit
            apart += np.float32(total[i] - off) != np.float32(total[i] + off)
        if unit > 0 and apart:
            for i in range(length):
                off = np.float64(math.sqrt(squares[i])) * unit
                differ = np.float32(total[i] - off) != np.float32(total[i] + off)
                if differ and math.isfinite(total[i]):
                    doubtful[found] = start + i
                    found += 1
    return found


@compiled
def _turn(bits: npt.NDArray[Any], target: npt.NDArray[Any]) -> None:
    """A float's bits to the integer that sorts like it, and back: negative numbers are turned over."""
    width = 8 * bits.itemsize
    flips, sign = bits.dtype.type((1 << (width - 1)) - 1), bits.dtype.type(width - 1)
    for i in range(len(bits)):
        target[i] = bits[i] ^ ((bits[i] >> sign) & flips)


@compiled
def _exchange(lines: npt.NDArray[Any], comparisons: npt.NDArray[np.int32]) -> None:
    for at in range(len(comparisons)):
        low, high = lines[comparisons[at, 0]], lines[comparisons[at, 1]]
        for i in range(len(low)):
            x, y = low[i], high[i]
            low[i] = min(x, y)
            high[i] = max(x, y)


@compiled
def rank(
    rows: npt.NDArray[Any], comparisons: npt.NDArray[np.int32], first: int, ranks: npt.NDArray[Any]
) -> None:
    """(n, width) integers, the bits of floats, to (k, width): the ranks of each column from `first` on."""
    n, width = rows.shape
    lines = np.zeros((n, LINE), rows.dtype)
    for start in range(0, width, LINE):
        end = min(start + LINE, width)
        for k in range(n):
            _turn(rows[k, start:end], lines[k])
        _exchange(lines, comparisons)
        for k in range(len(ranks)):
            _turn(lines[first + k, : end - start], ranks[k, start:end])


@compiled
def mean_over(rows: npt.NDArray[Any], mean: Float64s) -> None:
    """(k, width), sorted in each column, to (width,): added in the order of the rows, alike ones kept."""
    k, width = rows.shape
    for start in range(0, width, CHUNK):
        part = mean[start : start + CHUNK]
        part[:] = -0.0
        for row in range(k):
            line = rows[row, start : start + CHUNK]
            for i in range(len(part)):
                part[i] += line[i]
        low, high = rows[0, start : start + CHUNK], rows[k - 1, start : start + CHUNK]
        for i in range(len(part)):
            part[i] = low[i] if low[i] == high[i] else part[i] / k


def _squared(x: Float32s, y: Float32s) -> float:
    total = 0.0
    for i in range(len(x)):
        apart = np.float64(x[i] - y[i])
        total += apart * apart
    return total


# Summed in an order that suits the processor: like matrix products, alike on processors of one kind.
_squared = compiled(_squared, fastmath={"reassoc", "contract"})


@compiled
def add_distances(rows: Float32s, squared: Float64s) -> None:
    """Add to (n * (n - 1) / 2,) float64 the squared distances of (n, width), pairs as `torch.pdist` has them."""
    n, width = rows.shape
    for start in range(0, width, CHUNK):
        end = min(start + CHUNK, width)
        pair = 0
        for a in range(n):
            for b in range(a + 1, n):
                squared[pair] += _squared(rows[a, start:end], rows[b, start:end])
                pair += 1


def try_out() -> None:
    """Use each loop once, as float32 models do: what can't be compiled, or is broken on disk, raises here."""
    no_files, few, row = np.empty(0, np.intc), np.zeros((2, 3), np.float32), np.empty(3)
    read_rows(no_files, 0, few.view(np.uint8))
    add_up(no_files, 0, row[:0], 1.0, 0.0, 0.0, row, np.empty(3, np.int64))
    rank(few.view(np.int32), np.array([[0, 1]], np.int32), 0, few.view(np.int32))
    mean_over(few, row)
    add_distances(few, row[:1])
