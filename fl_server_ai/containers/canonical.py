"""The canonical form of weights: what the safetensors library writes, read here by its own strict rules.

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

from fl_server_ai.containers.limits import Limits
from fl_server_core.exceptions import BadContainer

# In the library's order: rank decides where a tensor lies, bytes how long it is.
DTYPE_BYTES: Mapping[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "C64": 8, "F64": 8, "I64": 8, "U64": 8,
}  # fmt: skip
RANK = {name: rank for rank, name in enumerate(DTYPE_BYTES)}
METADATA = "__metadata__"


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
    entries = _json(raw)
    metadata = _metadata(entries.pop(METADATA, {}))
    if len(entries) > limits.tensors:
        raise BadContainer(
            f"{len(entries):,} tensors; {limits.tensors:,} are allowed", code="TOO_MANY_TENSORS"
        )
    start = 8 + length
    infos = [_tensor(name, entry, start, limits) for name, entry in entries.items()]
    infos.sort(key=lambda info: (info.offset, info.offset + info.nbytes, info.name))
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


def _json(raw: bytes) -> dict[str, Any]:
    if raw[:1] != b"{":
        raise BadContainer("the header is not a JSON object")
    if raw.count(b"[", 0) + raw.count(b"{") > 64 and _depth(raw) > 4:
        raise BadContainer("the header is nested too deeply")
    try:
        found = json.loads(raw.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise BadContainer(f"the header is not valid JSON: {str(error)[:200]}") from error
    if not isinstance(found, dict):
        raise BadContainer("the header is not a JSON object")
    return found


def _depth(raw: bytes) -> int:
    """Deepest nesting, brackets in strings included: names with brackets may overstate it by a few."""
    depth = deepest = 0
    for byte in raw:
        if byte in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        elif byte in b"]}":
            depth -= 1
    return deepest


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _metadata(found: Any) -> dict[str, str]:
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise BadContainer("__metadata__ is not an object of strings")
    return found


def check_name(name: str, limits: Limits) -> str:
    """A tensor's name, or `BadContainer`: too long, empty, or with characters that nobody can see."""
    printable = all(" " <= char != "\x7f" for char in name) and not _surrogates(name)
    if not name or len(name) > limits.name_length or not printable or name == METADATA:
        raise BadContainer(f"bad tensor name {name[:64]!r}")
    return name


def _surrogates(name: str) -> bool:
    return any("\ud800" <= char <= "\udfff" for char in name)


def check_shape(name: str, shape: Any, limits: Limits) -> tuple[int, ...]:
    """A shape of whole numbers that some file could really hold, or `BadContainer`."""
    if (
        not isinstance(shape, list | tuple)
        or len(shape) > limits.dimensions
        or not all(type(size) is int and 0 <= size <= 2**62 for size in shape)  # bool is no size
    ):
        raise BadContainer(f"tensor {name!r} has no valid shape")
    return tuple(shape)


def _tensor(name: str, entry: Any, start: int, limits: Limits) -> TensorInfo:
    check_name(name, limits)
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
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
