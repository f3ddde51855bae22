"""Bytes to float64 and back for float dtypes, bfloat16 included; without torch."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from fl_server_ai.containers import DTYPE_BYTES, TensorInfo
from fl_server_ai.containers.npy import NUMPY
from fl_server_ai.containers.writing import read_blocks

BLOCK = 2**17  # numbers
FLOATS = ("F64", "F32", "F16", "BF16")  # those that are calculated with here: NumPy has no float8
Values = NDArray[Any]
FLOAT8_MASKS = {"F8_E4M3": (0x00, 0x80, 0x38), "F8_E5M2": (0x00, 0x80, 0x3C)}  # 0, -0 and 1


def widened(raw: bytes | memoryview, dtype: str) -> Values:
    """Exactly the same numbers as float64; (n,)."""
    if dtype == "BF16":
        bits = np.frombuffer(raw, "<u2").astype(np.uint32) << 16
        return bits.view(np.float32).astype(np.float64)
    return np.frombuffer(raw, NUMPY[dtype]).astype(np.float64)


def is_mask(raw: bytes | memoryview, dtype: str) -> bool:
    """Whether all numbers are zero or one; of any float dtype."""
    if dtype in FLOAT8_MASKS:
        return bool(np.isin(np.frombuffer(raw, "u1"), FLOAT8_MASKS[dtype]).all())
    return bool(np.isin(widened(raw, dtype), (0.0, 1.0)).all())


def narrowed(values: Values, dtype: str) -> bytes:
    """Rounded once, to the nearest, halves to even; what is too large becomes infinity."""
    with np.errstate(over="ignore"):
        if dtype != "BF16":
            return values.astype(NUMPY[dtype]).tobytes()
        # To odd first: rounding to 24 bits and then to 8 would round twice.
        single = values.astype(np.float32)
        bits = single.view(np.uint32).copy()
        inexact = np.isfinite(single) & (single.astype(np.float64) != values)
        toward = inexact & (np.abs(single.astype(np.float64)) > np.abs(values))
        bits[toward] -= 1
        bits[inexact] |= 1
    kept = bits >> 16
    kept += ((bits & 0xFFFF) > 0x8000) | (((bits & 0xFFFF) == 0x8000) & (kept & 1 == 1))
    return kept.astype("<u2").tobytes()


def blocks(file: BinaryIO, info: TensorInfo) -> Iterator[memoryview]:
    """A tensor's bytes, `BLOCK` numbers at a time whatever the dtype."""
    size = DTYPE_BYTES[info.dtype]
    for start in range(0, info.nbytes, BLOCK * size):
        length = min(BLOCK * size, info.nbytes - start)
        parts = [bytes(part) for part in read_blocks(file, info.offset + start, length)]
        yield memoryview(parts[0] if len(parts) == 1 else b"".join(parts))


def number(path: Path, info: TensorInfo) -> float:
    """The one number of a tensor."""
    with path.open("rb", buffering=0) as file:
        raw = b"".join(bytes(block) for block in blocks(file, info))
    return float(widened(raw, info.dtype)[0])
