"""The header of one `.npy` array, versions 1 to 3: a Python literal, read as one and never evaluated."""

import ast
import math
import re
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

from fl_server_ai.containers.canonical import check_shape
from fl_server_ai.containers.limits import Limits
from fl_server_core.exceptions import BadContainer

NUMPY: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype("?"), "U8": np.dtype("u1"), "I8": np.dtype("i1"), "I16": np.dtype("<i2"),
    "U16": np.dtype("<u2"), "F16": np.dtype("<f2"), "I32": np.dtype("<i4"), "U32": np.dtype("<u4"),
    "F32": np.dtype("<f4"), "C64": np.dtype("<c8"), "F64": np.dtype("<f8"), "I64": np.dtype("<i8"),
    "U64": np.dtype("<u8"),
}  # fmt: skip
SAFETENSORS = {dtype: name for name, dtype in NUMPY.items()}
DESCR = re.compile(r"[<>|=](b1|[iu][1248]|f[248]|c8)")  # no objects, strings, records or dates
# Version: width of the header's length, and the header's encoding.
VERSIONS = {b"\x01\x00": (2, "latin-1"), b"\x02\x00": (4, "latin-1"), b"\x03\x00": (4, "utf-8")}
MAX_HEADER = 10_000  # bytes; numpy's own limit for files that are not trusted


@dataclass(frozen=True)
class Array:
    """What a header says; `stored` is the dtype with the byte order of the file."""

    stored: np.dtype[Any]
    fortran: bool
    shape: tuple[int, ...]
    nbytes: int
    header_bytes: int

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.stored.newbyteorder("<")


def read_array(file: IO[bytes], name: str, limits: Limits) -> Array:
    """Read the header of tensor `name`; `file` stands at the first number afterwards."""
    magic = file.read(8)
    width, encoding = VERSIONS.get(magic[6:], (0, ""))
    if magic[:6] != b"\x93NUMPY" or not width:
        raise BadContainer(f"{name!r} is no .npy array of versions 1 to 3")
    length = int.from_bytes(file.read(width), "little")
    if length > MAX_HEADER:
        raise BadContainer(f"{name!r} has a header of {length:,} bytes")
    try:
        found = ast.literal_eval(file.read(length).decode(encoding).strip())
    # All that the parser raises for bytes that are no literal or nested too deeply.
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError, Warning) as error:
        raise BadContainer(f"the header of {name!r} is no literal") from error
    if not isinstance(found, dict) or found.keys() != {"descr", "fortran_order", "shape"}:
        raise BadContainer(f"the header of {name!r} is not that of an array")
    descr, fortran = found["descr"], found["fortran_order"]
    if not isinstance(descr, str) or not DESCR.fullmatch(descr) or not isinstance(fortran, bool):
        raise BadContainer(f"tensor {name!r} has the dtype {str(descr)[:64]!r}, which is not taken")
    stored = np.dtype(descr)
    shape = check_shape(name, found["shape"], limits)
    nbytes = math.prod(shape) * stored.itemsize
    return Array(stored, fortran and len(shape) > 1, shape, nbytes, 8 + width + length)
