"""Tensors as bytes, for a worker that needs no torch: safetensors' dtype names, C order, little-endian."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from fl_server_ai.containers.canonical import DTYPE_BYTES

NUMPY: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"), "I16": np.dtype("<i2"), "I8": np.dtype("i1"), "U8": np.dtype("u1"),
    "U16": np.dtype("<u2"), "U32": np.dtype("<u4"), "U64": np.dtype("<u8"), "BOOL": np.dtype("?"),
    "C64": np.dtype("<c8"),
}  # fmt: skip
NAMES = {dtype: name for name, dtype in NUMPY.items()}
# What goes in and comes out of a program; the odd 8 bit floats do not.
CARRIED = frozenset(NUMPY) | {"BF16"}


@dataclass(frozen=True)
class RawTensor:
    """A named tensor's bytes. Raises ValueError unless they are as many as dtype and shape say."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes | bytearray | memoryview
    name: str = ""

    def __post_init__(self) -> None:
        if self.dtype not in CARRIED:
            raise ValueError(f"dtype {self.dtype[:16]!r} is not carried")
        if self.nbytes != memoryview(self.data).nbytes:
            raise ValueError(f"{self.shape} of {self.dtype} are not that many bytes")

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]

    @property
    def finite(self) -> bool:
        """Whether there is neither NaN nor infinity in it."""
        array = self.numpy()
        return array.dtype.kind not in "fc" or bool(np.isfinite(array).all())

    def numpy(self) -> np.ndarray[Any, Any]:
        """The numbers, read-only; BF16, which numpy lacks, becomes float32 with the same values."""
        if self.dtype == "BF16":
            wide = np.frombuffer(self.data, "<u2").astype("<u4") << 16
            floats: np.ndarray[Any, Any] = wide.view("<f4").reshape(self.shape)
            return floats
        array: np.ndarray[Any, Any] = np.frombuffer(self.data, NUMPY[self.dtype])
        array = array.reshape(self.shape)
        array.flags.writeable = False
        return array

    @classmethod
    def of(cls, array: np.ndarray[Any, Any], name: str = "") -> "RawTensor":
        """Of a numpy array of any order; its dtype must be one that safetensors names."""
        dtype = array.dtype.newbyteorder("<")
        if dtype not in NAMES:
            raise ValueError(f"dtype {array.dtype} is not carried")
        packed = np.ascontiguousarray(array, dtype)
        return cls(NAMES[dtype], array.shape, packed.reshape(-1).view(np.uint8).data, name)
