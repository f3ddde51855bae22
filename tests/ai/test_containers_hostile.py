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
from fl_server_core.exceptions import (
    BadContainer,
    DomainError,
    TooLarge,
    UnknownContainer,
)

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


def zipped(
    *entries: tuple[str, bytes], deflate: bool = False, method: int = zipfile.ZIP_STORED
) -> bytes:
    buffer = io.BytesIO()
    method = zipfile.ZIP_DEFLATED if deflate else method
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


def claims_four_gigabytes() -> bytes:
    raw = bytearray(zipped(("w.npy", GOOD_NPY)))
    central = bytes(raw).index(b"PK\x01\x02")
    raw[central + 24 : central + 28] = struct.pack("<I", 0xF000_0000)
    return bytes(raw)


def directory_only(entries: int, claim: int | None = None) -> bytes:
    """An archive that is nothing but directory records, or claims to be."""
    records = (b"PK\x01\x02" + bytes(42)) * entries
    length = len(records) if claim is None else claim
    end = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 0xFFFF, 0xFFFF, length, 30, 0)
    return b"PK\x03\x04" + bytes(26) + records + end


def directory_elsewhere() -> bytes:
    """Each offset in the directory points before the file."""
    raw = zipped(("w.npy", GOOD_NPY))
    at = raw.index(b"PK\x05\x06") + 16
    return raw[:at] + struct.pack("<I", 0x7FFF_FFFF) + raw[at + 4 :]


def overlapping() -> bytes:
    raw = bytearray(zipped(("a.npy", GOOD_NPY), ("b.npy", GOOD_NPY)))
    central = bytes(raw).rindex(b"PK\x01\x02")
    raw[central + 20 : central + 28] = struct.pack("<II", 10_000, 10_000)
    return bytes(raw)


def descr(kind: str) -> bytes:
    header = f"{{'descr': {kind}, 'fortran_order': False, 'shape': (1,), }}\n"
    return zipped(("w.npy", npy_header(header, bytes(16))))


def fortran_bomb() -> bytes:
    header = "{'descr': '<f4', 'fortran_order': True, 'shape': (5000, 5000), }\n"
    return zipped(("w.npy", npy_header(header, bytes(10**8 - 4))), deflate=True)


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
    "zip that claims 4 GB": (claims_four_gigabytes, "BAD_CONTAINER"),
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
    "five million lists": (
        lambda: st_file(b'{"w":[' + b"[]," * 5_000_000 + b"[]]}"),
        "BAD_CONTAINER",
    ),
    "five million metadata keys": (
        lambda: st_file(b'{"__metadata__":{' + b'"a":"b",' * 2_000_000 + b'"a":"b"}}'),
        "BAD_CONTAINER",
    ),
    "metadata nested": (lambda: st_file({"__metadata__": {"a": {}}}), "BAD_CONTAINER"),
    "metadata twice": (
        lambda: st_file(b'{"__metadata__":{},"__metadata__":{}}'),
        "BAD_CONTAINER",
    ),
    "a field twice": (
        lambda: st_file(
            b'{"w":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)
        ),
        "BAD_CONTAINER",
    ),
    "a comma too many": (lambda: st_file(b'{"__metadata__":{},}'), "BAD_CONTAINER"),
    "text after the object": (lambda: st_file(b"{} {}"), "BAD_CONTAINER"),
    "a million backslashes": (lambda: st_file(b'{"' + b"\\\\" * 10**6), "BAD_CONTAINER"),
    "empty but overflowing": (
        lambda: st_file({"w": {**F4, "shape": [2**50, 2**50, 0], "data_offsets": [0, 0]}}),
        "BAD_CONTAINER",
    ),
    "zip of 300,000 entries": (lambda: directory_only(300_000), "TOO_MANY_TENSORS"),
    "zip with a directory of 20 MB": (lambda: directory_only(450_000), "HEADER_TOO_LARGE"),
    "zip with a directory of 4 GB": (lambda: directory_only(1, 2**32 - 2), "BAD_CONTAINER"),
    "zip with offsets before the file": (directory_elsewhere, "BAD_CONTAINER"),
    "zip with something after it": (
        lambda: zipped(("w.npy", GOOD_NPY)) + b"more",
        "BAD_CONTAINER",
    ),
    "zip with overlapping entries": (overlapping, "BAD_CONTAINER"),
    "zip packed by lzma": (
        lambda: zipped(("w.npy", GOOD_NPY), method=zipfile.ZIP_LZMA),
        "BAD_CONTAINER",
    ),
    "npy in Fortran order, inflating, short": (fortran_bomb, "BAD_CONTAINER"),
    "npy of extended floats": (lambda: descr("'<f16'"), "BAD_CONTAINER"),
    "npy of dates": (lambda: descr("'<M8[s]'"), "BAD_CONTAINER"),
    "npy of an odd kind": (lambda: descr("'<i3'"), "BAD_CONTAINER"),
    "npy whose dtype is a list": (lambda: descr("[('a', '<f4')]"), "BAD_CONTAINER"),
    "a pickle": (lambda: b"\x80\x04cos\nsystem\n.", "UNKNOWN_CONTAINER"),
}


CLASSES = {
    "UNKNOWN_CONTAINER": UnknownContainer,
}  # all others are BadContainer
MEMORY = 48 * 2**20  # bytes; the largest header allowed, and its text


@pytest.mark.parametrize("what", FILES)
def test_a_dishonest_file_is_refused_and_costs_nothing(what: str, tmp_path: Path) -> None:
    make, code = FILES[what]
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(made := make())
    marker = Path("/tmp/fl-hostile-marker")  # noqa: S108

    tracemalloc.start()
    with pytest.raises(DomainError) as refusal:
        extract(source, target, limits=Limits())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert type(refusal.value) is CLASSES.get(code, BadContainer)
    assert refusal.value.error_code == code
    assert list(tmp_path.iterdir()) == [source]
    assert source.read_bytes() == made
    assert not marker.exists()
    assert peak < MEMORY


def test_what_unpacks_beyond_the_limits_is_too_large(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    honest = np.zeros((2500, 1000), np.float32)
    source.write_bytes(zipped(("w.npy", npy(honest)), deflate=True))

    with pytest.raises(TooLarge, match="unpack to more than"):
        extract(source, target, limits=Limits(file_bytes=10**6))
    with pytest.raises(TooLarge, match="claim to unpack"):
        extract(source, target, limits=Limits(npz_free=10**6))
    assert list(tmp_path.iterdir()) == [source]

    assert extract(source, target).manifest.num_params == honest.size


def test_a_file_over_the_limit_is_too_large_before_it_is_read(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(bytes(101))

    with pytest.raises(TooLarge):
        extract(source, tmp_path / "target", limits=Limits(file_bytes=100))


def test_ten_gigabytes_claimed_in_a_kilobyte_cost_a_kilobyte(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(one(shape=[2_684_354_560], data_offsets=[0, 10_737_418_240]).ljust(1024))

    tracemalloc.start()
    with pytest.raises(BadContainer):
        extract(source, tmp_path / "target")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < 2**20


def test_a_large_tensor_in_any_order_is_never_held_in_memory(tmp_path: Path) -> None:
    array = np.ones((4000, 4000), np.float32)
    source, target = tmp_path / "source", tmp_path / "target"
    np.savez(source.with_suffix(".npz"), fortran=np.asfortranarray(array), c=array)

    tracemalloc.start()
    extract(source.with_suffix(".npz"), target)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert target.stat().st_size > 2 * array.nbytes
    assert peak < 8 * 2**20
