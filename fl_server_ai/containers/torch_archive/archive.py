"""The zip archive that torch writes: one folder of entries, whose bytes lie where the directory says.

zipfile reads the directory and the small entries. The tensors' entries are stored uncompressed, so that their bytes
can be read, and overwritten, in the file itself.
"""

import re
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from fl_server_ai.containers.limits import Limits
from fl_server_ai.containers.writing import read_blocks
from fl_server_ai.containers.zips import opened
from fl_server_core.exceptions import BadContainer, TooLarge

LOCAL, CENTRAL, DESCRIPTOR = b"PK\x03\x04", b"PK\x01\x02", b"PK\x07\x08"
NAMED_PATH = re.compile(r"[^/\\\0]+(/[^/\\\0]+)+")
# Files and folders that torch's readers look for.
KNOWN = (
    "data.pkl",
    "constants.pkl",
    "bytecode.pkl",
    "version",
    "byteorder",
    "data",
    "code",
    "constants",
)
PIECE = 2**16
STREAMED = 0x8  # flag: sizes and CRC follow the data


@dataclass(frozen=True)
class Entry:
    """One file in the archive; its `size` bytes begin at `start`. The CRC is kept in two places."""

    name: str
    start: int
    size: int
    crc: int
    crc_places: tuple[int, ...]
    stored: bool  # not compressed


class Archive:
    """An open archive. `entries` are named without the folder that they all lie in."""

    def __init__(self, file: BinaryIO, zip: zipfile.ZipFile, limits: Limits) -> None:
        self.file = file
        self.zip = zip
        self.limits = limits
        self.dtypes: dict[str, str] = {}  # of storages, as the program says them
        infos = zip.infolist()
        folder = _folder(infos)
        _check_spelling(info.filename.removeprefix(folder) for info in infos)
        found = zip_entries(file, infos, zip.start_dir)
        self.entries = {entry.name.removeprefix(folder): entry for entry in found}
        self.folder = folder
        unpacked = sum(info.file_size for info in infos if info.compress_type)
        if unpacked > limits.unpacked_code:
            raise TooLarge(f"compressed entries unpack to more than {limits.unpacked_code:,} bytes")

    def read(self, name: str, most: int) -> bytes:
        """A small entry, whole; zipfile checks its CRC."""
        entry = self.entries.get(name)
        if entry is None:
            raise BadContainer(f"the archive has no {name!r}")
        info = self.zip.getinfo(self.folder + name)
        if info.file_size > most:
            raise TooLarge(
                f"{name!r} has {info.file_size:,} bytes; {most:,} are allowed",
                code="HEADER_TOO_LARGE",
            )
        # Piece by piece: zipfile unpacks all there is before it looks how much that should be.
        data = bytearray()
        with self.zip.open(info) as file:
            while piece := file.read(min(PIECE, info.file_size - len(data))):
                data += piece
        if len(data) != info.file_size:
            raise BadContainer(f"{name!r} is shorter than it claims")
        return bytes(data)

    def storage(self, key: str) -> Entry:
        """The entry that holds the numbers of the storage `key`."""
        entry = self.entries.get(f"data/{key}")
        if entry is None:
            raise BadContainer(f"the archive has no storage {key[:64]!r}")
        if not entry.stored:
            raise BadContainer(f"storage {key!r} is compressed; torch stores it as it is")
        return entry


@contextmanager
def open_archive(path: Path, limits: Limits) -> Iterator[Archive]:
    """The archive at `path`, checked; whatever is wrong with it is `BadContainer`."""
    with opened(path, limits) as zip, path.open("rb", buffering=0) as file:
        yield Archive(file, zip, limits)


def checked_blocks(file: BinaryIO, entry: Entry) -> Iterator[memoryview]:
    """The entry's bytes; `BadContainer` after the last of them unless their CRC is right."""
    crc = 0
    for block in read_blocks(file, entry.start, entry.size):
        crc = zlib.crc32(block, crc)
        yield block
    if crc != entry.crc:
        raise BadContainer(f"{entry.name[:64]!r} has a wrong CRC: the file was damaged on its way")


def crc_of(file: BinaryIO, entry: Entry) -> int:
    """The CRC-32 of the bytes that are there."""
    crc = 0
    for block in read_blocks(file, entry.start, entry.size):
        crc = zlib.crc32(block, crc)
    return crc


def _folder(infos: list[zipfile.ZipInfo]) -> str:
    """The one folder that all entries lie in, with its slash."""
    for info in infos:
        parts = info.filename.split("/")
        if not NAMED_PATH.fullmatch(info.filename) or {".", ".."} & set(parts):
            raise BadContainer(f"bad name {info.filename[:64]!r} in the archive")
        if parts[0] != infos[0].filename.split("/")[0]:
            raise BadContainer("the archive's entries don't lie in one folder")
    if not infos:
        raise BadContainer("the archive is empty")
    return infos[0].filename.split("/")[0] + "/"


def _check_spelling(names: Iterable[str]) -> None:
    """torch takes capitals for small letters: what it would find must be what is found here."""
    for name in names:
        low = name.lower()
        known = next((known for known in KNOWN if low == known or low.startswith(f"{known}/")), "")
        odd = known and not name.startswith(known)
        if odd or (known == "code" and not name.endswith((".py", ".py.debug_pkl"))):
            raise BadContainer(f"the archive has a file that torch does not write: {name[:64]!r}")


def zip_entries(file: BinaryIO, infos: list[zipfile.ZipInfo], directory: int) -> list[Entry]:
    """Where each entry's bytes and CRCs are. Refuses entries that overlap or contradict themselves."""
    found = []
    directory_start = directory
    for info in infos:
        found.append(_entry(file, info, directory))
        (name, extra, comment) = struct.unpack("<HHH", _at(file, directory + 28, 6))
        directory += 46 + name + extra + comment
    end = 0
    for info, entry in sorted(
        zip(infos, found, strict=True), key=lambda pair: pair[0].header_offset
    ):
        if info.header_offset < end:
            raise BadContainer(f"{entry.name[:64]!r} overlaps another entry of the archive")
        end = entry.start + info.compress_size
    if end > directory_start:
        raise BadContainer("an entry reaches into the archive's directory")
    return found


def _entry(file: BinaryIO, info: zipfile.ZipInfo, directory: int) -> Entry:
    local = _at(file, info.header_offset, 30)
    flags, method = struct.unpack("<HH", local[6:10])
    crc, packed, size, name_length, extra_length = struct.unpack("<LLLHH", local[14:30])
    start = info.header_offset + 30 + name_length + extra_length
    places = [directory + 16]
    if flags & STREAMED:
        descriptor = _at(file, start + info.compress_size, 8)
        signed = descriptor[:4] == DESCRIPTOR
        places.append(start + info.compress_size + (4 if signed else 0))
        (crc,) = struct.unpack("<L", descriptor[4:] if signed else descriptor[:4])
    else:
        places.append(info.header_offset + 14)
        told = {size, packed} - {0xFFFFFFFF}  # zip64 keeps them elsewhere
        if not told <= {info.file_size, info.compress_size}:
            raise BadContainer(f"{info.filename[:64]!r} has two sizes in the archive")
    if (
        local[:4] != LOCAL
        or _at(file, directory, 4) != CENTRAL
        or _at(file, info.header_offset + 30, name_length).decode("utf-8", "replace")
        != info.filename
        or (method, crc) != (info.compress_type, info.CRC)
    ):
        raise BadContainer(f"the archive contradicts itself about {info.filename[:64]!r}")
    stored = info.compress_type == zipfile.ZIP_STORED
    return Entry(info.filename, start, info.file_size, info.CRC, tuple(places), stored)


def _at(file: BinaryIO, offset: int, count: int) -> bytes:
    file.seek(offset)
    data = file.read(count)
    if len(data) != count:
        raise BadContainer("the archive is cut off")
    return data
