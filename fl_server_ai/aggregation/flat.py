"""Vectors beside a model, with a number for each of its float numbers: state, extras, what clients get.

In files of this form `momentum.0` is a flat vector over the model's first run of float tensors, and so on; a run
is all neighbouring tensors of one dtype in the canonical order. float64 tensors have float64 numbers
there, all others float32.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from fl_server_ai.aggregation.dtypes import FLOAT_DTYPES
from fl_server_ai.containers import DTYPE_BYTES, TensorInfo


@dataclass(frozen=True)
class FloatRun:
    """Neighbouring float tensors of one dtype, and the dtype of what lies beside them."""

    dtype: str
    beside: str
    tensors: tuple[TensorInfo, ...]

    @property
    def count(self) -> int:
        return sum(math.prod(tensor.shape) for tensor in self.tensors)


def float_runs(tensors: Sequence[TensorInfo]) -> list[FloatRun]:
    """The runs that hold any numbers, in the model's canonical order."""
    runs = []
    for dtype, group in groupby(tensors, key=lambda tensor: tensor.dtype):
        members = tuple(group)
        if dtype in FLOAT_DTYPES and any(tensor.nbytes for tensor in members):
            runs.append(FloatRun(dtype, "F64" if dtype == "F64" else "F32", members))
    return runs


def places(name: str, run: FloatRun, index: int) -> list[tuple[TensorInfo, str, int, int]]:
    """Where each tensor of run `index` lies: tensor, vector, first byte in the vector, bytes."""
    found, at = [], 0
    for tensor in run.tensors:
        size = math.prod(tensor.shape) * DTYPE_BYTES[run.beside]
        found.append((tensor, f"{name}.{index}", at, size))
        at += size
    return found
