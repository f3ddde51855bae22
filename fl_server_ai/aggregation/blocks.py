"""Weight files as flat runs of numbers: their layout, reading them in blocks, writing a new one."""

import hashlib
import json
import os
import secrets
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from fl_server_ai.aggregation.strategy import UpdateMeta
from fl_server_core.exceptions import AggregationException

FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
SIZES = {
    **{name: dtype.itemsize for name, dtype in FLOATS.items()},
    "BOOL": 1,
    **{f"{kind}{bits}": bits // 8 for kind in "UI" for bits in (8, 16, 32, 64)},
}
MAX_HEADER = 100_000_000  # bytes; the limit that safetensors itself has
OPEN_FILES = 256  # with more updates than this, files are opened for each read
CHUNK = 1 << 20


class UpdateChanged(AggregationException):
    """An update's file is gone, or is not the one that was accepted."""

    def __init__(self, participant: str, reason: str) -> None:
        super().__init__(f"the update of participant {participant} {reason}")
        self.participant = participant


@dataclass(frozen=True)
class UpdateFile:
    """A canonical safetensors file; `sha256` (hex) is compared only if `aggregate` is asked to verify."""

    path: Path
    meta: UpdateMeta
    sha256: str | None = None


@dataclass(frozen=True)
class Run:
    """Neighbouring tensors of one dtype: `count` numbers from byte `offset` of the file on."""

    dtype: str
    offset: int
    count: int

    @property
    def itemsize(self) -> int:
        return SIZES[self.dtype]


@dataclass(frozen=True)
class Layout:
    """What all files of a round share: the header, byte for byte, and the runs behind it."""

    header: bytes
    runs: tuple[Run, ...]
    size: int

    def locate(self, offset: int) -> str:
        """The tensor that byte `offset` of the file belongs to."""
        entries: dict[str, Any] = json.loads(self.header[8:])
        inside = offset - len(self.header)
        return next(
            name
            for name, entry in entries.items()
            if name != "__metadata__"
            and entry["data_offsets"][0] <= inside < entry["data_offsets"][1]
        )


def parse_layout(header: bytes) -> Layout:
    """Of a whole header, its eight length bytes included; what it says is checked at intake."""
    try:
        entries = json.loads(header[8:])
        tensors = sorted(
            (entry["data_offsets"], entry["dtype"])
            for name, entry in entries.items()
            if name != "__metadata__"
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        raise AggregationException("the header of the weight files cannot be read") from None
    runs = []
    end = 0
    for dtype, group in groupby(tensors, key=lambda tensor: tensor[1]):
        if dtype not in SIZES:
            raise AggregationException(f"tensors of dtype {dtype} cannot be aggregated")
        spans = [offsets for offsets, _ in group]
        begin, end = spans[0][0], spans[-1][1]
        runs.append(Run(dtype, len(header) + begin, (end - begin) // SIZES[dtype]))
    return Layout(header, tuple(run for run in runs if run.count), len(header) + end)


def read_header(fd: int) -> bytes:
    """The header's bytes with their length in front; ValueError if there is none."""
    prefix = os.pread(fd, 8, 0)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > MAX_HEADER:
        raise ValueError("has no safetensors header")
    header = prefix + os.pread(fd, length, 8)
    if len(header) != 8 + length:
        raise ValueError("ends within its header")
    return header


class Source:
    """A file that is read in blocks and never written. Threads may share it.

    Raises `UpdateChanged` as soon as the file is missing, shorter, or touched since it was opened.
    """

    def __init__(self, path: Path, participant: str, *, keep_open: bool = True) -> None:
        self.path = path
        self.participant = participant
        self._fd: int | None = None
        fd = self._open()
        try:
            self._stamp = self._stamp_of(fd)
            self.size = os.fstat(fd).st_size
            self.header = read_header(fd)
        except ValueError as error:
            os.close(fd)
            raise UpdateChanged(participant, str(error)) from None
        if keep_open:
            self._fd = fd
        else:
            os.close(fd)

    def _open(self) -> int:
        try:
            return os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise UpdateChanged(self.participant, "has disappeared") from None

    @staticmethod
    def _stamp_of(fd: int) -> tuple[int, int, int]:
        stat = os.fstat(fd)
        return stat.st_ino, stat.st_size, stat.st_mtime_ns

    def read_into(self, target: memoryview, offset: int) -> None:
        if self._fd is not None:
            self._fill(self._fd, target, offset)
            return
        fd = self._open()
        try:
            self._compare(fd)
            self._fill(fd, target, offset)
            self._compare(fd)
        finally:
            os.close(fd)

    def _fill(self, fd: int, target: memoryview, offset: int) -> None:
        done = os.preadv(fd, [target], offset)
        while done < len(target):
            got = os.preadv(fd, [target[done:]], offset + done)
            if not got:
                raise UpdateChanged(self.participant, "has become shorter")
            done += got

    def digest(self) -> str:
        """sha256 of the whole file, hex."""
        sha = hashlib.sha256()
        buffer = memoryview(bytearray(CHUNK))
        for offset in range(0, self.size, CHUNK):
            part = buffer[: min(CHUNK, self.size - offset)]
            self.read_into(part, offset)
            sha.update(part)
        return sha.hexdigest()

    def assert_unchanged(self) -> None:
        if self._fd is not None:
            self._compare(self._fd)

    def _compare(self, fd: int) -> None:
        if self._stamp_of(fd) != self._stamp:
            raise UpdateChanged(self.participant, "was written to during the aggregation")

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


class Draft:
    """A file that appears under its name only when it is complete and on disk.

    Until `publish` it lies beside it under a name of its own; `discard` removes it and may be called twice.
    """

    def __init__(self, path: Path, header: bytes, size: int) -> None:
        self.path = path
        self.size = size
        self._temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.part")
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._fd: int | None = os.open(self._temporary, flags, 0o666)
        try:
            os.posix_fallocate(self._fd, 0, size)  # a full disk is found now, not at the end
            self.write(header, 0)
        except BaseException:
            self.discard()
            raise

    @property
    def fd(self) -> int:
        if self._fd is None:
            raise ValueError(f"{self.path} is closed")
        return self._fd

    def write(self, data: bytes | memoryview, offset: int) -> None:
        view = memoryview(data)
        while view:
            done = os.pwrite(self.fd, view, offset)
            view, offset = view[done:], offset + done

    def publish(self) -> str:
        """Make it durable and visible; returns its sha256. Digest and fsync run side by side."""
        failed: list[OSError] = []

        def sync() -> None:
            try:
                os.fsync(self.fd)
            except OSError as error:
                failed.append(error)

        thread = threading.Thread(target=sync, name="aggregate-fsync")
        thread.start()
        sha = hashlib.sha256()
        buffer = memoryview(bytearray(CHUNK))
        for offset in range(0, self.size, CHUNK):
            sha.update(buffer[: os.preadv(self.fd, [buffer], offset)])
        thread.join()
        if failed:
            raise failed[0]
        os.replace(self._temporary, self.path)
        directory = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
        os.close(self.fd)
        self._fd = None
        return sha.hexdigest()

    def discard(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
            self._temporary.unlink(missing_ok=True)


def assert_same_header(sources: Sequence[Source], layout: Layout) -> None:
    """Name the first participant whose tensors are not the others', and how they differ."""
    for source in sources:
        if source.header != layout.header:
            raise AggregationException(
                f"the update of participant {source.participant} cannot be combined: "
                f"{_difference(layout.header, source.header)}"
            )
        if source.size != layout.size:
            raise UpdateChanged(
                source.participant, f"has {source.size} bytes, its header says {layout.size}"
            )


def _difference(expected: bytes, given: bytes) -> str:
    try:
        ours, theirs = json.loads(expected[8:]), json.loads(given[8:])
    except ValueError:
        return "its header is not JSON"
    for name in ours | theirs:
        if name not in theirs:
            return f"tensor {name!r} is missing"
        if name not in ours:
            return f"tensor {name!r} is not in the other files"
        for key in ("dtype", "shape"):
            if ours[name].get(key) != theirs[name].get(key):
                return (
                    f"tensor {name!r} has {key} {theirs[name].get(key)}, not {ours[name].get(key)}"
                )
    return "its header is written in another form"
