"""The canonical form of weights: what the safetensors library writes, read here by strict rules.

A file is eight bytes of header length, a JSON header, and the tensors back to back. For a given set of names,
dtypes and shapes there is one canonical header: tensors ordered by falling alignment of their dtype, then by name, compact
JSON, padded with spaces to eight bytes, no metadata. Canonical files of one model therefore have byte-identical
headers, and what follows them is one flat vector.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from fl_server_ai.containers.header import read_header
from fl_server_ai.containers.limits import Limits
from fl_server_core.exceptions import BadContainer

# In the library's order: rank decides where a tensor lies, bytes how long it is.
DTYPE_BYTES: Mapping[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "C64": 8, "F64": 8, "I64": 8, "U64": 8,
}  # fmt: skip
# Of numbers, also in a shape with a zero in it: the library counts bits in 64-bit integers.
MAX_COUNT = 2**56
RANK = {name: rank for rank, name in enumerate(DTYPE_BYTES)}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: `dtype` in safetensors' names, `offset` in bytes from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Manifest:
    """What a file's header says. `tensors` are in the order in which their bytes lie."""

    tensors: tuple[TensorInfo, ...]
    data_offset: int
    total_bytes: int
    header_bytes: bytes  # with the eight bytes of its length: equal for files of one layout
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def num_params(self) -> int:
        """Numbers in all tensors."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors)

    def layout(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """Name, dtype and shape of each tensor."""
        return [(tensor.name, tensor.dtype, tensor.shape) for tensor in self.tensors]


def canonical_header(
    layout: Iterable[tuple[str, str, tuple[int, ...]]],
) -> tuple[bytes, tuple[TensorInfo, ...]]:
    """The header (with its length) for these tensors, and where each one's bytes belong."""
    ordered = sorted(layout, key=lambda item: (-RANK[item[1]], item[0].encode()))
    entries: dict[str, Any] = {}
    at = 0
    for name, dtype, shape in ordered:
        end = at + math.prod(shape) * DTYPE_BYTES[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    infos = tuple(
        TensorInfo(
            name,
            entry["dtype"],
            tuple(entry["shape"]),
            len(header) + entry["data_offsets"][0],
            entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in entries.items()
    )
    return header, infos


def read_manifest(path: Path, limits: Limits | None = None) -> Manifest:
    """Read and check a safetensors header. Anything dishonest is `BadContainer`; no tensor is read."""
    with path.open("rb") as file:
        return parse(file, path.stat().st_size, limits or Limits())


def parse(file: BinaryIO, size: int, limits: Limits) -> Manifest:
    """The same for an open file of `size` bytes that stands at its start."""
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > size - 8:
        raise BadContainer(f"the header claims {length:,} bytes, the file has {size:,}")
    if length > limits.header_bytes:
        raise BadContainer(
            f"the header has {length:,} bytes; {limits.header_bytes:,} are allowed",
            code="HEADER_TOO_LARGE",
        )
    raw = file.read(length)
    if len(raw) != length:
        raise BadContainer("the file ends within its header")
    entries, metadata = read_header(raw, limits)
    start = 8 + length
    infos = [_tensor(name, entry, start, limits) for name, entry in entries.items()]
    # Stable: empty tensors at one place stay in the header's order.
    infos.sort(key=lambda info: (info.offset, info.nbytes))
    at = start
    for info in infos:
        if info.offset != at:
            raise BadContainer(
                f"tensor {info.name!r} begins at byte {info.offset - start}, not at {at - start}: "
                "tensors overlap or leave a gap"
            )
        at += info.nbytes
    if at != size:
        raise BadContainer(f"the tensors end at byte {at:,}, the file at {size:,}")
    return Manifest(tuple(infos), start, size, prefix + raw, metadata)


def check_shape(name: str, shape: Any, limits: Limits) -> tuple[int, ...]:
    """A shape of whole numbers that some file could really hold, or `BadContainer`."""
    if (
        not isinstance(shape, list | tuple)
        or len(shape) > limits.dimensions
        or not all(
            type(size) is int and 0 <= size <= MAX_COUNT for size in shape
        )  # bool is no size
        or math.prod(size or 1 for size in shape) > MAX_COUNT
    ):
        raise BadContainer(f"tensor {name!r} has no valid shape")
    return tuple(shape)


def _tensor(name: str, entry: dict[str, Any], start: int, limits: Limits) -> TensorInfo:
    if entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise BadContainer(f"tensor {name!r} needs dtype, shape and data_offsets, and nothing else")
    dtype, offsets = entry["dtype"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise BadContainer(f"tensor {name!r} has the unknown dtype {str(dtype)[:32]!r}")
    shape = check_shape(name, entry["shape"], limits)
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(type(n) is int and 0 <= n <= 2**62 for n in offsets)
    ):
        raise BadContainer(f"tensor {name!r} has no valid offsets")
    nbytes = math.prod(shape) * DTYPE_BYTES[dtype]
    if offsets[1] - offsets[0] != nbytes:
        raise BadContainer(
            f"tensor {name!r} of shape {list(shape)} needs {nbytes:,} bytes, not "
            f"{offsets[1] - offsets[0]:,}"
        )
    return TensorInfo(name, dtype, shape, start + offsets[0], nbytes)
