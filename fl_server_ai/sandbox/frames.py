"""Frames on the pipes between worker and child: two lengths, a JSON header, raw bytes of tensors. Never pickle.

The header's `tensors` say name, dtype and shape of what the body holds, back to back. Both sides check that
against the body's length; the worker also bounds everything, since the child is not to be trusted.
"""

import json
import math
import struct
from collections.abc import Sequence
from typing import Any

LENGTHS = struct.Struct("<IQ")  # of header and body
HEADER = 16 * 2**20  # bytes; a worker's header names all tensors of a weight set
ANSWER_HEADER = 2**16  # bytes of a header that the child may send
DIMENSIONS = 64
SHORTEST = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "U16": 2,
    "U32": 4, "U64": 8, "BOOL": 1, "C64": 8,
}  # fmt: skip


class BadFrame(Exception):
    """The other side says something that doesn't add up."""


def packed_header(header: dict[str, Any], body: int) -> bytes:
    """What goes before `body` bytes of tensors."""
    text = json.dumps(header, separators=(",", ":"), allow_nan=False).encode()
    return LENGTHS.pack(len(text), body) + text


def parsed_header(raw: bytes | bytearray) -> dict[str, Any]:
    """The header, a JSON object; its members are not checked yet."""
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise BadFrame("the header is no JSON") from error
    if type(header) is not dict:
        raise BadFrame("the header is no JSON object")
    return header


def described(header: dict[str, Any], body: int) -> list[tuple[str, str, tuple[int, ...], int]]:
    """Name, dtype, shape and bytes of each tensor; they fill the body exactly, or it is a `BadFrame`."""
    entries = header.get("tensors", [])
    found = []
    total = 0
    if not isinstance(entries, list):
        raise BadFrame("the tensors are not listed")
    for entry in entries:
        if not isinstance(entry, list) or len(entry) != 3:
            raise BadFrame("a tensor is not described by name, dtype and shape")
        name, dtype, shape = entry
        if type(name) is not str or type(dtype) is not str or dtype not in SHORTEST:
            raise BadFrame("a tensor has no known dtype")
        nbytes = math.prod(_shape(shape), start=SHORTEST[dtype])
        found.append((name, dtype, tuple(shape), nbytes))
        total += nbytes
    if total != body:
        raise BadFrame(f"tensors of {total:,} bytes are said to be {body:,}")
    return found


def _shape(shape: Any) -> Sequence[int]:
    if not isinstance(shape, list) or len(shape) > DIMENSIONS:
        raise BadFrame("a tensor has no valid shape")
    for size in shape:
        if type(size) is not int or not 0 <= size < 2**48:
            raise BadFrame("a tensor has no valid shape")
    if math.prod(size or 1 for size in shape) >= 2**56:  # numpy refuses it even if a size is 0
        raise BadFrame("a tensor has no valid shape")
    return shape
