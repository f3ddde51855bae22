"""Safetensors files whose headers lie."""

import json
import struct
from collections.abc import Callable
from typing import Any

from tests.ai.hostile.building import BAD, HEADER, HONEST, MANY, UNKNOWN, hostile

F4: dict[str, Any] = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def written(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def one(**changes: Any) -> bytes:
    return written({"w": {**F4, **changes}}, bytes(4))


def at(*offsets: int) -> dict[str, Any]:
    return {**F4, "data_offsets": list(offsets)}


HONEST["safetensors"] = one
FILES: dict[str, tuple[Callable[[], bytes], tuple[str, ...]]] = {
    "with overlapping tensors": (lambda: written({"a": F4, "b": F4}, bytes(4)), (BAD,)),
    "with half overlapping tensors": (lambda: written({"a": F4, "b": at(2, 6)}, bytes(6)), (BAD,)),
    "with a gap": (lambda: written({"a": F4, "b": at(8, 12)}, bytes(12)), (BAD,)),
    "with a gap at the start": (lambda: written({"a": at(4, 8)}, bytes(8)), (BAD,)),
    "with bytes after the tensors": (lambda: written({"a": F4}, bytes(8)), (BAD,)),
    "cut short": (lambda: written({"a": F4}, bytes(3)), (BAD,)),
    "in no order, and cut short": (lambda: written({"a": at(4, 8), "b": F4}, bytes(7)), (BAD,)),
    "of a hundred thousand tensors": (
        lambda: written({str(i): at(4 * i, 4 * i + 4) for i in range(100_000)}, bytes(400_000)), (MANY,),
    ),
    "with a header of seventeen megabytes": (
        lambda: written(b"{" + b" " * (17 * 2**20)), (HEADER,),
    ),
    "that claims a header of a hundred megabytes": (
        lambda: written(b"{}", length=100 * 2**20), (BAD, HEADER),
    ),
    "that claims a header of 2^63": (lambda: written(b"{}", length=2**63), (BAD,)),
    "that claims a header of 2^64 - 8": (lambda: written(b"{}", length=2**64 - 8), (BAD,)),
    "with a name twice": (
        lambda: written(b'{"w":%b,"w":%b}' % ((json.dumps(F4).encode(),) * 2), bytes(4)), (BAD,),
    ),
    "with a name twice, once escaped": (
        lambda: written(b'{"w":%b,"\\u0077":%b}' % ((json.dumps(F4).encode(),) * 2), bytes(4)), (BAD,),
    ),
    "with a field twice": (
        lambda: written(b'{"w":{"dtype":"F32","shape":[1],"shape":[1],"data_offsets":[0,4]}}', bytes(4)),
        (BAD,),
    ),
    "of an unknown dtype": (lambda: one(dtype="F128"), (BAD,)),
    "of a dtype that is a list": (lambda: one(dtype=["F32"]), (BAD,)),
    "nested a million times": (lambda: written(b'{"w":' + b"[" * 1_000_000), (BAD,)),
    "nested a million times in objects": (lambda: written(b'{"w":' * 1_000_000), (BAD,)),
    "with nested offsets": (
        lambda: written(b'{"w":{"dtype":"F32","shape":[1],"data_offsets":' + b"[" * 3000 + b"]" * 3000 + b"}}"),
        (BAD,),
    ),
    "with a negative offset": (lambda: written({"w": at(-4, 0)}, bytes(4)), (BAD,)),
    "with an offset of 2^64": (lambda: written({"w": at(2**64, 2**64 + 4)}, bytes(4)), (BAD,)),
    "with a size of four thousand digits": (
        lambda: written(b'{"w":{"dtype":"F32","shape":[%b],"data_offsets":[0,4]}}' % (b"9" * 4000), bytes(4)),
        (BAD,),
    ),
    "of 2^32 by 2^32": (lambda: one(shape=[2**32, 2**32]), (BAD,)),
    "of size Infinity": (
        lambda: written(b'{"w":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,4]}}', bytes(4)), (BAD,),
    ),
    "with a byte order mark": (lambda: written(b"\xef\xbb\xbf{}"), (BAD, UNKNOWN)),
    "with megabytes of metadata": (
        lambda: written(b'{"__metadata__":{' + b",".join(b'"%d":""' % i for i in range(900_000)) + b"}}"), (BAD,),
    ),
    "with a tensor for metadata": (lambda: written({"__metadata__": F4}), (BAD,)),
    "with escapes of fifteen megabytes": (
        lambda: written(b'{"' + b"\\u0041" * 2_500_000 + b'":1}'), (BAD,),
    ),
}  # fmt: skip
for _name, (_build, _codes) in FILES.items():
    hostile(f"safetensors {_name}", *_codes)(_build)
