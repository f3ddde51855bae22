"""Dishonest files: each gets its code, leaves nothing behind, and costs no memory."""

import io
import json
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fl_server_ai.containers import Limits, extract
from fl_server_core.exceptions import DomainError

F4 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def st_file(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def one(**changes: Any) -> bytes:
    return st_file({"w": {**F4, **changes}}, bytes(4))


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def npy_header(text: str, data: bytes = b"") -> bytes:
    raw = text.encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(raw)) + raw + data


def zipped(*entries: tuple[str, bytes], deflate: bool = False) -> bytes:
    buffer = io.BytesIO()
    method = zipfile.ZIP_DEFLATED if deflate else zipfile.ZIP_STORED
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in entries:
            archive.writestr(name, data)
    return buffer.getvalue()


def patched(data: bytes, old: bytes, new: bytes) -> bytes:
    assert old in data
    return data.replace(old, new)


GOOD_NPY = npy(np.arange(4, dtype=np.float32))
HUGE = "{'descr': '<f4', 'fortran_order': False, 'shape': (2684354560,), }\n"


def wrong_crc() -> bytes:
    return patched(zipped(("w.npy", GOOD_NPY)), GOOD_NPY[-4:], b"\xff\xff\xff\xff")


def encrypted() -> bytes:
    raw = bytearray(zipped(("w.npy", GOOD_NPY)))
    raw[6] |= 1
    central = bytes(raw).index(b"PK\x01\x02")
    raw[central + 8] |= 1
    return bytes(raw)


def claims_ten_gigabytes() -> bytes:
    raw = bytearray(zipped(("w.npy", GOOD_NPY)))
    central = bytes(raw).index(b"PK\x01\x02")
    raw[central + 24 : central + 28] = struct.pack("<I", 0xF000_0000)
    return bytes(raw)


class Marker:
    """Would write a file if it were ever unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, ("/tmp/fl-hostile-marker", "w"))  # noqa: S108


FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    "length beyond the file": (lambda: st_file({}, length=10**9), "BAD_CONTAINER"),
    "length of 2^63": (lambda: st_file(b"{}", length=2**63), "BAD_CONTAINER"),
    "only a length": (lambda: struct.pack("<Q", 0), "UNKNOWN_CONTAINER"),
    "header is a list": (lambda: st_file([]), "UNKNOWN_CONTAINER"),
    "header is cut": (lambda: st_file(b'{"w":'), "BAD_CONTAINER"),
    "header is not UTF-8": (lambda: st_file(b'{"\xff":1}'), "BAD_CONTAINER"),
    "a name twice": (lambda: st_file(b'{"w":1,"w":1}'), "BAD_CONTAINER"),
    "NaN as a number": (lambda: st_file(b'{"w":NaN}'), "BAD_CONTAINER"),
    "nested a million deep": (lambda: st_file(b'{"w":' + b"[" * 10**6), "BAD_CONTAINER"),
    "nested and closed": (
        lambda: st_file(b'{"w":' + b"[" * 10**5 + b"]" * 10**5 + b"}"),
        "BAD_CONTAINER",
    ),
    "an integer of 100,000 digits": (
        lambda: st_file(b'{"w":' + b"9" * 100_000 + b"}"),
        "BAD_CONTAINER",
    ),
    "100,000 tensors": (
        lambda: st_file(
            {f"w{n}": {**F4, "shape": [0], "data_offsets": [0, 0]} for n in range(100_000)}
        ),
        "TOO_MANY_TENSORS",
    ),
    "a header of 17 MB": (lambda: st_file(b'{"w":"' + b"x" * (17 * 2**20)), "HEADER_TOO_LARGE"),
    "metadata is a number": (lambda: st_file({"__metadata__": {"a": 1}}), "BAD_CONTAINER"),
    "entry is a string": (lambda: st_file({"w": "x"}), "BAD_CONTAINER"),
    "entry with more keys": (lambda: one(more=1), "BAD_CONTAINER"),
    "unknown dtype": (lambda: one(dtype="F31"), "BAD_CONTAINER"),
    "dtype is a list": (lambda: one(dtype=["F32"]), "BAD_CONTAINER"),
    "negative size": (lambda: one(shape=[-1]), "BAD_CONTAINER"),
    "two negative sizes": (lambda: one(shape=[-1, -1]), "BAD_CONTAINER"),
    "a size that is true": (lambda: one(shape=[True]), "BAD_CONTAINER"),
    "a size that is a float": (lambda: one(shape=[1.0]), "BAD_CONTAINER"),
    "overflowing shape": (lambda: one(shape=[2**33, 2**33]), "BAD_CONTAINER"),
    "10 GB claimed in 1 KB": (
        lambda: one(shape=[2_684_354_560], data_offsets=[0, 10_737_418_240]),
        "BAD_CONTAINER",
    ),
    "a hundred dimensions": (lambda: one(shape=[1] * 100), "BAD_CONTAINER"),
    "offsets backwards": (lambda: one(data_offsets=[4, 0]), "BAD_CONTAINER"),
    "offsets beyond the file": (lambda: one(data_offsets=[4, 8]), "BAD_CONTAINER"),
    "three offsets": (lambda: one(data_offsets=[0, 4, 8]), "BAD_CONTAINER"),
    "overlapping tensors": (lambda: st_file({"a": F4, "b": F4}, bytes(4)), "BAD_CONTAINER"),
    "a gap": (
        lambda: st_file({"a": F4, "b": {**F4, "data_offsets": [8, 12]}}, bytes(12)),
        "BAD_CONTAINER",
    ),
    "bytes after the end": (lambda: st_file({"w": F4}, bytes(5)), "BAD_CONTAINER"),
    "data cut": (lambda: st_file({"w": F4}, bytes(3)), "BAD_CONTAINER"),
    "an empty name": (lambda: st_file({"": F4}, bytes(4)), "BAD_CONTAINER"),
    "a NUL in a name": (lambda: st_file({"a\x00b": F4}, bytes(4)), "BAD_CONTAINER"),
    "a name of a megabyte": (lambda: st_file({"w" * 10**6: F4}, bytes(4)), "BAD_CONTAINER"),
    "a lone surrogate": (
        lambda: st_file(b'{"\\ud800":%s}' % json.dumps(F4).encode(), bytes(4)),
        "BAD_CONTAINER",
    ),
    "zip cut": (lambda: zipped(("w.npy", GOOD_NPY))[:40], "BAD_CONTAINER"),
    "zip with a wrong CRC": (wrong_crc, "BAD_CONTAINER"),
    "zip encrypted": (encrypted, "BAD_CONTAINER"),
    "zip that claims 4 GB": (claims_ten_gigabytes, "BAD_CONTAINER"),
    "zip bomb": (lambda: zipped(("w.npy", bytes(50 * 10**6)), deflate=True), "BAD_CONTAINER"),
    "zip with a name twice": (
        lambda: patched(zipped(("a.npy", GOOD_NPY), ("b.npy", GOOD_NPY)), b"b.npy", b"a.npy"),
        "BAD_CONTAINER",
    ),
    "zip with text in it": (lambda: zipped(("readme.txt", b"x")), "BAD_CONTAINER"),
    "zip with a path": (lambda: zipped(("../../etc/x\x01.npy", GOOD_NPY)), "BAD_CONTAINER"),
    "npy of objects": (lambda: zipped(("w.npy", npy(np.array([Marker()])))), "BAD_CONTAINER"),
    "npy of records": (
        lambda: zipped(("w.npy", npy(np.zeros(2, [("a", "f4")])))),
        "BAD_CONTAINER",
    ),
    "npy of strings": (lambda: zipped(("w.npy", npy(np.array(["a"])))), "BAD_CONTAINER"),
    "npy that claims 10 GB": (lambda: zipped(("w.npy", npy_header(HUGE))), "BAD_CONTAINER"),
    "npy header calls code": (
        lambda: zipped(
            ("w.npy", npy_header("__import__('os').system('touch /tmp/fl-hostile-marker')\n"))
        ),
        "BAD_CONTAINER",
    ),
    "npy header nested": (
        lambda: zipped(("w.npy", npy_header("(" * 9_000 + "\n"))),
        "BAD_CONTAINER",
    ),
    "npy cut": (lambda: zipped(("w.npy", GOOD_NPY[:-3])), "BAD_CONTAINER"),
    "npy with more bytes": (lambda: zipped(("w.npy", GOOD_NPY + b"more")), "BAD_CONTAINER"),
    "npy version 9": (lambda: zipped(("w.npy", b"\x93NUMPY\x09\x00" + bytes(50))), "BAD_CONTAINER"),
    "a pickle": (lambda: b"\x80\x04cos\nsystem\n.", "NOT_AVAILABLE"),
}


@pytest.mark.parametrize("what", FILES)
def test_a_dishonest_file_is_refused_and_costs_nothing(what: str, tmp_path: Path) -> None:
    make, code = FILES[what]
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(make())
    marker = Path("/tmp/fl-hostile-marker")  # noqa: S108

    tracemalloc.start()
    with pytest.raises(DomainError) as refusal:
        extract(source, target, limits=Limits())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert refusal.value.error_code == code.replace("BAD_CONTAINER", "BAD_CONTAINER")
    assert not target.exists()
    assert list(tmp_path.iterdir()) == [source]
    assert not marker.exists()
    assert peak < 64 * 2**20 + source.stat().st_size * 3
