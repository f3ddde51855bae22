"""Numpy archives whose arrays are objects, whose headers are programs, or that unpack without end."""

import struct
from collections.abc import Callable

from tests.ai.hostile.building import (
    BAD,
    HONEST,
    MANY,
    MARKER,
    TOO_LARGE,
    Part,
    call,
    hostile,
    path,
    program,
    text,
    zeros_packed,
    zipped,
)  # fmt: skip

FLOATS = "{'descr': '<f4', 'fortran_order': False, 'shape': (4,), }\n"


def npy(
    header: str | bytes, data: bytes = bytes(16), version: int = 1, length: int | None = None
) -> bytes:
    raw = header.encode("latin-1") if isinstance(header, str) else header
    size = len(raw) if length is None else length
    return (
        b"\x93NUMPY"
        + bytes([version, 0])
        + struct.pack("<H" if version == 1 else "<I", size)
        + raw
        + data
    )


def archive(data: bytes, name: str = "w.npy") -> bytes:
    return zipped(Part(name, data))


def described(descr: str, data: bytes = bytes(16), shape: str = "(4,)") -> bytes:
    return archive(npy(f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n", data))


PICKLED = program(call(path("os", "system"), text(f"touch {MARKER}")))
GIGABYTE = 2**30
HONEST["npz"] = lambda: archive(npy(FLOATS))
FILES: dict[str, tuple[Callable[[], bytes], tuple[str, ...]]] = {
    "of pickled objects": (lambda: described("'|O'", PICKLED, "(1,)"), (BAD,)),
    "of pickled objects in a record": (lambda: described("[('a', '|O')]", PICKLED, "(1,)"), (BAD,)),
    "that holds a pickle": (lambda: archive(PICKLED), (BAD,)),
    "that holds a pickle with another name": (lambda: archive(PICKLED, "w.pkl"), (BAD,)),
    "of Python 2's long integers": (lambda: described("'<f4'", shape="(4L,)"), (BAD,)),
    "whose header calls a function": (
        lambda: archive(npy(f"__import__('os').system('touch {MARKER}')\n")), (BAD,),
    ),
    "whose header is a comprehension": (
        lambda: described("[c for c in ().__class__.__base__.__subclasses__()]"), (BAD,),
    ),
    "whose header multiplies": (lambda: described("'<f4'", shape="(9**9**9,)"), (BAD,)),
    "whose header is nested": (lambda: archive(npy("(" * 9_000 + "\n")), (BAD,)),
    "whose header is nested in minus signs": (lambda: archive(npy("-" * 9_000 + "1\n")), (BAD,)),
    "whose header has an integer of nine thousand digits": (
        lambda: described("'<f4'", shape=f"({'9' * 9_000},)"), (BAD,),
    ),
    "whose header has an unknown escape": (lambda: described("'\\q'"), (BAD,)),
    "whose header claims 4 GB": (lambda: archive(npy(FLOATS, version=2, length=2**32 - 1)), (BAD,)),
    "whose header has ten megabytes": (
        lambda: archive(npy(FLOATS + " " * 10**7, version=2)), (BAD,),
    ),
    "whose header is no UTF-8": (lambda: archive(npy(b"{'\xff'", version=3)), (BAD,)),
    "whose header has a NUL": (lambda: archive(npy(FLOATS.replace("4", "\0"))), (BAD,)),
    "of a negative size": (lambda: described("'<f4'", shape="(-4,)"), (BAD,)),
    "of a true size": (lambda: described("'<f4'", shape="(True,)"), (BAD,)),
    "of 2^62 numbers": (lambda: described("'<f4'", shape=f"({2**62},)"), (BAD,)),
    "of 65 dimensions": (lambda: described("'<f4'", bytes(4), f"({'1,' * 65})"), (BAD,)),
    "of texts": (lambda: described("'<U4'"), (BAD,)),
    "of nothing": (lambda: archive(b""), (BAD,)),
    "of arrays with a path": (lambda: archive(npy(FLOATS), "../../w\x7f.npy"), (BAD,)),
    "with an empty name": (lambda: archive(npy(FLOATS), ".npy"), (BAD,)),
    "with an array twice": (
        lambda: zipped(Part("w.npy", npy(FLOATS)), Part("w.npy", npy(FLOATS))), (BAD,),
    ),
    "with a wrong CRC": (lambda: zipped(Part("w.npy", npy(FLOATS), crc=1)), (BAD,)),
    "with two arrays in one place": (
        lambda: zipped(Part("a.npy", npy(FLOATS)), Part("b.npy", npy(FLOATS), offset=0)), (BAD,),
    ),
    "of twenty-six thousand arrays": (
        lambda: zipped(*(Part(f"{i}.npy", npy(FLOATS)) for i in range(26_000))), (MANY,),
    ),
    "that unpacks to 2 GB": (
        lambda: zipped(
            Part("w.npy", zeros_packed(128 * 2**20), method=8, size=2 * GIGABYTE, crc=0)
        ), (TOO_LARGE,),
    ),
    "that unpacks to more than it claims": (
        lambda: zipped(Part("w.npy", zeros_packed(128 * 2**20), method=8, size=100, crc=0)), (BAD,),
    ),
}  # fmt: skip
for _name, (_build, _codes) in FILES.items():
    hostile(f"npz {_name}", *_codes)(_build)
