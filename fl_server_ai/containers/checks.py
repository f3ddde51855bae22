"""Whether weights may be used: the global model's tensors, tied where it is, and finite numbers only."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fl_server_ai.containers.canonical import DTYPE_BYTES, Manifest, TensorInfo
from fl_server_ai.containers.writing import BLOCK, read_blocks
from fl_server_core.exceptions import (
    BadContainer,
    DtypeMismatch,
    KeyMismatch,
    NonFinite,
    ShapeMismatch,
    TiedMismatch,
)

WRAPPERS = ("module.", "_module.", "_orig_mod.")
SHOWN = 10
# How to read the bits, and those that are all ones in NaN and infinity and in nothing else.
# F8_E4M3 has no infinity.
EXPONENT: Mapping[str, tuple[str, int]] = {
    "F64": ("<u8", 0x7FF0_0000_0000_0000),
    "F32": ("<u4", 0x7F80_0000),
    "C64": ("<u4", 0x7F80_0000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
    "F8_E5M2": ("u1", 0x7C),
    "F8_E4M3": ("u1", 0x7F),
}


def check_against(manifest: Manifest, expected: Manifest) -> None:
    """Raise `KeyMismatch`, `ShapeMismatch` or `DtypeMismatch` unless the tensors are the expected ones."""
    if manifest.header_bytes == expected.header_bytes:
        return
    mine = {tensor.name: tensor for tensor in manifest.tensors}
    theirs = {tensor.name: tensor for tensor in expected.tensors}
    _check_names(mine, theirs)
    shapes = [name for name, wanted in theirs.items() if mine[name].shape != wanted.shape]
    if shapes:
        name = shapes[0]
        got, wanted = list(mine[name].shape), list(theirs[name].shape)
        raise ShapeMismatch(
            f"tensor {name!r} has shape {got}, the global model has {wanted}{_also(shapes)}",
            tensor=name,
            expected=wanted,
            got=got,
        )
    dtypes = [name for name, wanted in theirs.items() if mine[name].dtype != wanted.dtype]
    if dtypes:
        name = dtypes[0]
        raise DtypeMismatch(
            f"tensor {name!r} is {mine[name].dtype}, the global model has "
            f"{theirs[name].dtype}{_also(dtypes)}",
            tensor=name,
            expected=theirs[name].dtype,
            got=mine[name].dtype,
        )


def _also(names: list[str]) -> str:
    """The next few that differ, for the end of a message."""
    more = ", ".join(map(repr, names[1:3])) + (" …" if len(names) > 3 else "")
    return f"; so do {more}" if more else ""


def _check_names(mine: Mapping[str, TensorInfo], theirs: Mapping[str, TensorInfo]) -> None:
    missing, unexpected = sorted(theirs.keys() - mine.keys()), sorted(mine.keys() - theirs.keys())
    if not missing and not unexpected:
        return
    said = "; ".join(
        f"{what} {', '.join(map(repr, names[:3]))}{' …' if len(names) > 3 else ''}"
        for what, names in (("missing", missing), ("unexpected", unexpected))
        if names
    )
    for prefix in WRAPPERS:
        if {name.removeprefix(prefix) for name in mine} == theirs.keys() or {
            name.removeprefix(prefix) for name in theirs
        } == mine.keys():
            said += f"; the names differ by the wrapper prefix {prefix!r}: unwrap the module first"
            break
    raise KeyMismatch(
        f"the tensors are not the global model's: {said}",
        missing=missing[:SHOWN],
        unexpected=unexpected[:SHOWN],
    )


def check_ties(path: Path, manifest: Manifest, ties: Iterable[Iterable[str]]) -> None:
    """Raise `TiedMismatch` unless the names of each group hold the same bytes, as they do in the model.

    The tensors must be the expected ones already. One pass over the tied ones in constant memory.
    """
    infos = {tensor.name: tensor for tensor in manifest.tensors}
    with path.open("rb", buffering=0) as one, path.open("rb", buffering=0) as other:
        for first, *others in ties:
            for name in others:
                left = read_blocks(one, infos[first].offset, infos[first].nbytes)
                right = read_blocks(other, infos[name].offset, infos[name].nbytes)
                if any(a != b for a, b in zip(left, right, strict=True)):
                    raise TiedMismatch(
                        f"tensors {first!r} and {name!r} are one in the global model, but differ here; "
                        "tie them again before sending",
                        tensor=name,
                        tied_to=first,
                    )


def check_some(manifest: Manifest) -> None:
    """Raise `BadContainer` (NO_TENSORS) for a model in which there is nothing to train."""
    if not manifest.tensors:
        raise BadContainer(
            "the file holds no tensors to train; a TorchScript module must be saved before it is frozen",
            code="NO_TENSORS",
        )


def check_finite(path: Path, manifest: Manifest) -> None:
    """Raise `NonFinite` with the first tensor that holds NaN or infinity, and the flat index of the first.

    One pass in constant memory.
    """
    scratch = np.empty(BLOCK, np.uint8)
    with path.open("rb", buffering=0) as file:
        for tensor in manifest.tensors:
            if tensor.dtype not in EXPONENT:
                continue
            done = 0
            for block in read_blocks(file, tensor.offset, tensor.nbytes):
                at = _first_bad(block, tensor.dtype, scratch)
                if at is not None:
                    index = (done + at) // DTYPE_BYTES[tensor.dtype]
                    raise NonFinite(
                        f"tensor {tensor.name!r} holds NaN or infinity, first at flat index {index}",
                        tensor=tensor.name,
                        index=index,
                    )
                done += len(block)


def _first_bad(block: memoryview, dtype: str, scratch: np.ndarray[Any, Any]) -> int | None:
    """Byte offset of the first number whose exponent is all ones: integer arithmetic, no warnings."""
    kind, mask = EXPONENT[dtype]
    bits = np.frombuffer(block, kind)
    masked = scratch[: len(block)].view(kind)
    np.bitwise_and(bits, bits.dtype.type(mask), out=masked)
    if masked.max() != mask:
        return None
    return int(np.argmax(masked)) * bits.itemsize
