"""One float tensor as it was sent, checked, as blocks of float64 numbers.

=========  ===========================  ===================================================================
encoding   tensor `<name>`              beside it
=========  ===========================  ===================================================================
none       the model's dtype
fp16       F16
bf16       BF16
int8       U8 q                         `extra.enc.scale.<name>`, `extra.enc.zero.<name>`: (q - zero) * scale
qsgd       I8 or I16 level l            `extra.enc.norm.<name>`, metadata `levels` s: norm * l / s
topk       the k numbers that are sent  `extra.enc.index.<name>`: their flat indices, ascending, U32 or I64
=========  ===========================  ===================================================================

A tensor in the model's own dtype and shape, with nothing beside it, is taken as it is in every encoding.
Updates of kind sparse have indices in the same way.
"""

import math
from bisect import bisect_left
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fl_server_ai.containers import DTYPE_BYTES, TensorInfo
from fl_server_ai.received.form import Form
from fl_server_ai.received.numbers import BLOCK, FLOATS, Values, blocks, number, widened
from fl_server_core.exceptions import DtypeMismatch, ShapeMismatch, Unusable

INDICES: dict[str, np.dtype[Any]] = {"U32": np.dtype("<u4"), "I64": np.dtype("<i8")}
LEVELS: dict[str, np.dtype[Any]] = {"I8": np.dtype("i1"), "I16": np.dtype("<i2")}
PLAIN = {"fp16": "F16", "bf16": "BF16"}


class Coded:
    """One tensor of an update: `wanted` is the model's, `info` what was sent for it."""

    def __init__(
        self,
        path: Path,
        form: Form,
        wanted: TensorInfo,
        info: TensorInfo,
        coding: dict[str, TensorInfo],
    ) -> None:
        self.path, self.form, self.wanted, self.info = path, form, wanted, info
        self.count = math.prod(wanted.shape)
        self._coding = coding
        self.index = self._indices()
        if self.index is None and info.shape != wanted.shape:
            raise ShapeMismatch(
                f"tensor {info.name!r} has shape {list(info.shape)}, the global model has "
                f"{list(wanted.shape)}",
                tensor=info.name,
                expected=list(wanted.shape),
                got=list(info.shape),
            )
        self._factor, self._zero = self._scale()

    @property
    def dense(self) -> bool:
        """Whether all numbers were sent."""
        return self.index is None

    def _beside(self, key: str) -> TensorInfo | None:
        return self._coding.get(f"{key}.{self.info.name}")

    def _number(self, key: str) -> float:
        info = self._beside(key)
        if info is None or math.prod(info.shape) != 1 or info.dtype not in (*FLOATS, "U8"):
            raise Unusable(
                f"{self.form.encoding} needs one number extra.enc.{key}.{self.info.name}",
                code="BAD_ENCODING",
                tensor=self.info.name,
            )
        return number(self.path, info)

    def _scale(self) -> tuple[float, float]:
        """What a number is multiplied by, after what is subtracted from it."""
        encoding, dtype = self.form.encoding, self.info.dtype
        if encoding == "int8" and dtype == "U8":
            return self._number("scale"), self._number("zero")
        if encoding == "qsgd" and dtype in LEVELS:
            return self._number("norm"), 0.0
        if dtype in FLOATS and dtype in (self.wanted.dtype, PLAIN.get(encoding)):
            return 1.0, 0.0
        raise DtypeMismatch(
            f"tensor {self.info.name!r} is {dtype}, the global model has {self.wanted.dtype}; "
            f"the update's encoding is {encoding}",
            tensor=self.info.name,
            expected=self.wanted.dtype,
            got=dtype,
        )

    def _indices(self) -> "np.ndarray[Any, Any] | None":
        info = self._beside("index")
        if info is None:
            return None
        if self.form.kind != "sparse" and self.form.encoding != "topk":
            raise Unusable(
                f"{info.name!r}: only kind sparse and encoding topk have indices",
                code="BAD_ENCODING",
                tensor=self.info.name,
            )
        fits = info.dtype in INDICES and len(info.shape) == 1 and info.shape == self.info.shape
        if not fits or info.shape[0] > self.count:
            raise Unusable(
                f"{info.name!r} must be as long as {self.info.name!r}, one-dimensional, "
                f"{' or '.join(INDICES)}, and no longer than the model's tensor",
                code="BAD_INDEX",
                tensor=self.info.name,
            )
        if not info.nbytes:
            return np.empty(0, np.int64)
        index: np.ndarray[Any, Any] = np.memmap(
            self.path, INDICES[info.dtype], mode="r", offset=info.offset, shape=info.shape
        )
        last = -1
        for start in range(0, len(index), BLOCK):
            part = index[start : start + BLOCK].astype(np.int64)
            if part[0] <= last or (np.diff(part) <= 0).any() or part[-1] >= self.count:
                raise Unusable(
                    f"{info.name!r} must ascend from 0 on and stay below {self.count:,}",
                    code="BAD_INDEX",
                    tensor=self.info.name,
                )
            last = int(part[-1])
        return index

    def values(self) -> Iterator[Values]:
        """Of a dense tensor: `BLOCK` numbers at a time."""
        with self.path.open("rb", buffering=0) as file:
            for block in blocks(file, self.info):
                yield self._decoded(block)

    def _decoded(self, block: bytes | memoryview) -> Values:
        encoding, dtype = self.form.encoding, self.info.dtype
        if dtype in FLOATS:
            return widened(block, dtype)
        if encoding == "int8":
            return (np.frombuffer(block, "u1").astype(np.float64) - self._zero) * self._factor
        levels = np.frombuffer(block, LEVELS[dtype]).astype(np.float64)
        if np.abs(levels).max(initial=0.0) > self.form.levels:
            raise Unusable(
                f"tensor {self.info.name!r} holds a level beyond {self.form.levels}",
                code="BAD_ENCODING",
                tensor=self.info.name,
            )
        decoded: Values = levels * self._factor / self.form.levels
        return decoded

    def scattered(self) -> Iterator[tuple[Values, Values]]:
        """Of a tensor with indices: for each dense block its places there and their numbers."""
        assert self.index is not None  # noqa: S101 - the caller asked `dense`
        size = DTYPE_BYTES[self.info.dtype]
        low = 0
        with self.path.open("rb", buffering=0) as file:
            for start in range(0, self.count, BLOCK):
                # NumPy's searchsorted copies all of an index whose dtype or alignment is not its own.
                high = bisect_left(self.index, start + BLOCK, lo=low)
                part = TensorInfo(
                    self.info.name,
                    self.info.dtype,
                    (high - low,),
                    self.info.offset + low * size,
                    (high - low) * size,
                )
                raw = b"".join(bytes(block) for block in blocks(file, part))
                places = self.index[low:high].astype(np.int64) - start
                yield places, self._decoded(raw) if raw else np.empty(0)
                low = high
