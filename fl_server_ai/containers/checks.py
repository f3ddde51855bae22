"""Whether weights may be used: the global model's tensors, and finite numbers only."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fl_server_ai.containers.canonical import Manifest, TensorInfo
from fl_server_ai.containers.writing import copy_range
from fl_server_core.exceptions import DtypeMismatch, KeyMismatch, NonFinite, ShapeMismatch

WRAPPERS = ("module.", "_module.", "_orig_mod.")
SHOWN = 10
# Bits that are all ones in NaN and infinity, and nowhere else; None: infinities do not exist.
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
    for name, wanted in theirs.items():
        got = mine[name]
        if got.shape != wanted.shape:
            raise ShapeMismatch(
                f"tensor {name!r} has shape {list(got.shape)}, the global model has "
                f"{list(wanted.shape)}",
                tensor=name,
            )
        if got.dtype != wanted.dtype:
            raise DtypeMismatch(
                f"tensor {name!r} is {got.dtype}, the global model has {wanted.dtype}", tensor=name
            )


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


def check_finite(path: Path, manifest: Manifest) -> None:
    """Raise `NonFinite` naming the first tensor with NaN or infinity; one pass in constant memory."""
    with path.open("rb") as file:
        for tensor in manifest.tensors:
            if tensor.dtype not in EXPONENT:
                continue
            for block in copy_range(file, tensor.offset, tensor.nbytes):
                if not _finite(block, tensor.dtype):
                    raise NonFinite(
                        f"tensor {tensor.name!r} holds NaN or infinity", tensor=tensor.name
                    )


def _finite(block: memoryview, dtype: str) -> bool:
    if dtype in {"F32", "C64"} and len(block) % 4 == 0:
        # One pass of a fast sum: a sum that is finite has no NaN and no infinity in it.
        with np.errstate(all="ignore"):
            values = np.frombuffer(block, "<f4")
            if np.isfinite(np.dot(values, np.zeros_like(values))):
                return True
    kind, mask = EXPONENT[dtype]
    bits = np.frombuffer(block, kind)
    return not bool(np.any((bits & bits.dtype.type(mask)) == mask))
