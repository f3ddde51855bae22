"""Opening a zip archive that may be hostile: its directory is bounded before zipfile loads it."""

import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fl_server_ai.containers.limits import Limits
from fl_server_core.exceptions import BadContainer

MAGIC = (b"PK\x03\x04", b"PK\x05\x06")
# All that zipfile, zlib and struct raise for damaged archives; not OSError, which is the disk's.
BROKEN = (
    zipfile.BadZipFile,
    zipfile.LargeZipFile,
    zlib.error,
    struct.error,
    EOFError,
    RuntimeError,  # encrypted, or a method that zipfile doesn't know
    ValueError,
    OverflowError,
    IndexError,
)


@contextmanager
def opened(source: Path, limits: Limits) -> Iterator[zipfile.ZipFile]:
    """The archive. Whatever is wrong with it, also while it is read, is `BadContainer`."""
    try:
        count = _check_directory(source, limits)
        with zipfile.ZipFile(source) as archive:
            if len(archive.infolist()) != count:
                raise BadContainer("the archive has another number of entries than it claims")
            _check_entries(archive.infolist(), source.stat().st_size)
            yield archive
    except BROKEN as error:
        raise BadContainer(f"a damaged archive: {str(error)[:200]}") from error


def _check_directory(source: Path, limits: Limits) -> int:
    """The number of entries that the archive's end tells, with its directory found where all readers find it.

    zipfile reads a directory of any claimed size, and makes an object of each entry in it. Other readers
    trust other fields than it does: all of them must say the same.
    """
    with source.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 98, 0))
        tail = file.read(98)
        # Numpy and torch write no comment after the last record, so that it can be nowhere else.
        if tail[-22:-18] != b"PK\x05\x06" or tail[-2:] != b"\0\0":
            raise BadContainer("the archive has no end: it is cut off, or something follows")
        end, told = size - 22, struct.unpack("<4H2L", tail[-18:-2])
        if tail[-42:-38] == b"PK\x06\x07":
            end, told = size - 98, _zip64_end(tail, size - 98, told)
        disk, first_disk, here, count, length, offset = told
        if length > end:
            raise BadContainer("the archive's directory is larger than the archive")
        if (disk, first_disk, here) != (0, 0, count) or offset != end - length:
            raise BadContainer("the archive's directory is not where its end says")
        if not length and end:
            raise BadContainer("the archive's directory is empty, the archive is not")
        if length > limits.header_bytes:
            raise BadContainer(
                f"the archive's directory has {length:,} bytes; {limits.header_bytes:,} are allowed",
                code="HEADER_TOO_LARGE",
            )
        file.seek(end - length)
        if file.read(length).count(b"PK\x01\x02") > limits.entries:
            raise BadContainer(
                f"more than {limits.entries:,} entries are not allowed", code="TOO_MANY_TENSORS"
            )
        return int(count)


def _zip64_end(tail: bytes, at: int, short: tuple[int, ...]) -> tuple[int, ...]:
    """What the zip64 record says, which must be the one that the locator means."""
    disk, offset, disks = struct.unpack("<LQL", tail[-38:-22])
    if tail[-98:-94] != b"PK\x06\x06" or (disk, offset, disks) != (0, at, 1):
        raise BadContainer("the archive's zip64 records contradict each other")
    length, *_, disk, first_disk, here, count, directory, begin = struct.unpack(
        "<Q2H2L4Q", tail[-94:-42]
    )
    long = (disk, first_disk, here, count, directory, begin)
    full = (0xFFFF,) * 4 + (0xFFFFFFFF,) * 2
    if length != 44 or any(a not in {b, c} for a, b, c in zip(short, long, full, strict=True)):
        raise BadContainer("the archive's zip64 records contradict each other")
    return long


def _check_entries(infos: list[zipfile.ZipInfo], size: int) -> None:
    # torch's reader takes capitals for small letters: "DATA.PKL" would hide "data.pkl".
    if len({info.filename.lower() for info in infos}) != len(infos):
        raise BadContainer("a name occurs twice in the archive")
    if infos and infos[0].header_offset and all(info.header_offset for info in infos):
        raise BadContainer("something lies before the archive's first entry")
    if sum(info.compress_size for info in infos) > size:
        raise BadContainer("entries of the archive overlap")
    for info in infos:
        name = info.filename[:64]
        if info.orig_filename != info.filename:
            raise BadContainer(f"bad name {info.orig_filename[:64]!r} in the archive")
        if not 0 <= info.header_offset < size:  # zipfile would seek there: an OSError
            raise BadContainer(f"{name!r} lies outside the archive")
        if info.flag_bits & 0x1:
            raise BadContainer(f"{name!r} is encrypted")
        if info.compress_type not in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
            raise BadContainer(f"{name!r} is compressed in a way that is not read here")
        if info.compress_type == zipfile.ZIP_STORED and info.compress_size != info.file_size:
            raise BadContainer(f"{name!r} claims another size than it has")
