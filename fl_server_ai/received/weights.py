"""Weights of any kind and encoding into whole canonical weights, block by block.

========  =======================================================================================
full      the number as it is
delta     base + number: added in float64 and rounded once to the model's dtype; integers are added
          modulo 2**bits, a bool is the new value
gradient  the number as it is; float tensors that are not sent are zero, integers stay the base's
subset    tensors that are not sent are the base's, and are left out of their mean
sparse    numbers that are not sent are the base's, and are left out of their mean
========  =======================================================================================
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from fl_server_ai.aggregation.dtypes import FLOAT_DTYPES
from fl_server_ai.aggregation.flat import FloatRun, float_runs
from fl_server_ai.containers import Manifest, TensorInfo
from fl_server_ai.containers.npy import NUMPY
from fl_server_ai.containers.writing import write_canonical
from fl_server_ai.received.coded import Coded
from fl_server_ai.received.form import Form
from fl_server_ai.received.names import Parts
from fl_server_ai.received.numbers import BLOCK, FLOATS, blocks, narrowed, widened
from fl_server_core.exceptions import DtypeMismatch, KeyMismatch, ShapeMismatch, Unusable


class Decoder:
    """The update at `path` over the base's weights; raises as soon as a tensor can't be used."""

    def __init__(self, path: Path, form: Form, parts: Parts, base: Path, model: Manifest) -> None:
        self.path, self.form, self.base, self.model = path, form, base, model
        self.parts = parts
        self._tensors = {tensor.name: tensor for tensor in model.tensors}
        self._coded: dict[str, Coded] = {}
        for name, info in parts.weights.items():
            wanted = self._tensors[name]
            if wanted.dtype in FLOATS:
                self._coded[name] = Coded(path, form, wanted, info, parts.coding)
            else:
                _check_same(info, wanted)
        used = {
            f"{key}.{name}" for key in ("scale", "zero", "norm", "index") for name in self._coded
        }
        if loose := sorted(set(parts.coding) - used):
            raise Unusable(
                f"'extra.enc.{loose[0]}' belongs to no float tensor of this update",
                code="BAD_ENCODING",
            )

    @property
    def holes(self) -> bool:
        """Whether single numbers of some tensor were left out of a sparse update."""
        return self.form.kind == "sparse" and any(not one.dense for one in self._coded.values())

    def write(self, target: Path) -> str:
        """Write the whole weights; the SHA-256 of the file."""
        return write_canonical(target, self.model.layout(), self._blocks)

    def _blocks(self, name: str) -> Iterator[bytes | memoryview]:
        wanted, info = self._tensors[name], self.parts.weights.get(name)
        with self.path.open("rb", buffering=0) as sent, self.base.open("rb", buffering=0) as base:
            if info is None:
                if self.form.kind == "gradient" and wanted.dtype in FLOAT_DTYPES:
                    yield from (bytes(len(block)) for block in blocks(base, wanted))
                else:
                    yield from blocks(base, wanted)
            elif name in self._coded:
                coded = self._coded[name]
                as_it_is = coded.dense and info.dtype == wanted.dtype
                if as_it_is and self.form.kind != "delta":
                    yield from blocks(sent, info)
                else:
                    yield from self._floats(coded, wanted, base)
            elif self.form.kind == "delta" and wanted.dtype != "BOOL" and wanted.dtype in NUMPY:
                for one, other in zip(blocks(sent, info), blocks(base, wanted), strict=True):
                    kind = NUMPY[wanted.dtype]
                    yield (np.frombuffer(one, kind) + np.frombuffer(other, kind)).tobytes()
            else:
                yield from blocks(sent, info)

    def _floats(self, coded: Coded, wanted: TensorInfo, base: BinaryIO) -> Iterator[bytes]:
        dtype, delta = wanted.dtype, self.form.kind == "delta"
        if coded.dense and not delta:
            for values in coded.values():
                yield narrowed(values, dtype)
        elif coded.dense:
            for values, block in zip(coded.values(), blocks(base, wanted), strict=True):
                yield _moved(widened(block, dtype), values, dtype)
        else:
            for (places, values), block in zip(
                coded.scattered(), blocks(base, wanted), strict=True
            ):
                whole = widened(block, dtype)
                if delta:
                    change = np.zeros(len(whole))
                    change[places] = values
                    yield _moved(whole, change, dtype)
                else:
                    whole[places] = values
                    yield narrowed(whole, dtype)

    def write_mask(self, target: Path) -> str:
        """Write which numbers were sent, as U8 vectors `mask.<run>` of ones and zeros."""
        runs = float_runs(self.model.tensors)
        vectors = {f"mask.{index}": run for index, run in enumerate(runs)}
        layout = [(name, "U8", (run.count,)) for name, run in vectors.items()]
        return write_canonical(target, layout, lambda name: self._mask(vectors[name]))

    def _mask(self, run: FloatRun) -> Iterator[bytes]:
        for tensor in run.tensors:
            coded, count = self._coded.get(tensor.name), math.prod(tensor.shape)
            if coded is not None and not coded.dense:
                starts = range(0, count, BLOCK)
                for start, (places, _) in zip(starts, coded.scattered(), strict=True):
                    block = np.zeros(min(BLOCK, count - start), np.uint8)
                    block[places] = 1
                    yield block.tobytes()
                continue
            byte = b"\0" if coded is None and tensor.dtype in FLOATS else b"\1"
            for start in range(0, count, BLOCK):
                yield byte * min(BLOCK, count - start)


def _moved(base: "np.ndarray[tuple[int], np.dtype[np.float64]]", by: object, dtype: str) -> bytes:
    """base + by, where a number that does not move keeps its bytes, minus zero included."""
    total = base + np.asarray(by)
    return narrowed(np.where(np.asarray(by) == 0, base, total), dtype)


def _check_same(info: TensorInfo, wanted: TensorInfo) -> None:
    if info.shape != wanted.shape:
        raise ShapeMismatch(
            f"tensor {info.name!r} has shape {list(info.shape)}, the global model has "
            f"{list(wanted.shape)}",
            tensor=info.name,
            expected=list(wanted.shape),
            got=list(info.shape),
        )
    if info.dtype != wanted.dtype:
        raise DtypeMismatch(
            f"tensor {info.name!r} is {info.dtype}, the global model has {wanted.dtype}",
            tensor=info.name,
            expected=wanted.dtype,
            got=info.dtype,
        )


def check_names(sent: set[str], model: Manifest, *, trained: set[str], form: Form) -> None:
    """Raise `KeyMismatch` for names the model has not, that are not trained, or that are missing."""
    known = {tensor.name for tensor in model.tensors}
    if more := sorted(sent - known):
        raise KeyMismatch(
            f"the global model has no tensor {more[0]!r}", extra=more[:10], missing=[]
        )
    if kept := sorted(sent - trained):
        raise Unusable(
            f"tensor {kept[0]!r} is not part of this training (its options include and exclude); "
            "leave it out",
            code="TENSOR_EXCLUDED",
            tensor=kept[0],
        )
    if not sent:
        raise KeyMismatch("the update holds no weights", extra=[], missing=sorted(trained)[:10])
    if form.kind in ("subset", "sparse"):
        return
    need = trained
    if form.kind == "gradient":  # float8 weights are mostly frozen: they may go without
        floats = {tensor.name for tensor in model.tensors if tensor.dtype in FLOATS}
        need = trained & floats
    if missing := sorted(need - sent):
        raise KeyMismatch(
            f"tensor {missing[0]!r} is missing; to send some tensors only, say kind subset",
            missing=missing[:10],
            extra=[],
        )
