"""Weight files as flat runs of numbers: their layout, reading them in blocks, writing a new one."""

import hashlib
import os
import secrets
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import groupby
from pathlib import Path
from typing import Protocol

import torch

from fl_server_ai.aggregation.dtypes import AGGREGATED
from fl_server_ai.aggregation.strategy import UpdateMeta
from fl_server_ai.containers import Limits, TensorInfo
from fl_server_ai.containers.canonical import parse
from fl_server_core.exceptions import AggregationException, BadContainer

FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
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
    """A canonical safetensors file; `sha256` (hex) is compared only if `aggregate` is asked to verify.

    `extras` holds what came beside the weights, in the form of `flat.py`. With `tensors`, only those
    were sent: the others, which are the base's in the file, are left out of their means. `mask` says the
    same of single numbers: vectors `mask.<run>` of U8, 1 where one was sent.
    `start` is the model that it was trained from, where that is not the round's base.
    """

    path: Path
    meta: UpdateMeta
    sha256: str | None = None
    extras: Path | None = None
    tensors: frozenset[str] | None = None
    mask: Path | None = None
    start: Path | None = None


@dataclass(frozen=True)
class Run:
    """Neighbouring tensors of one dtype: `count` numbers from byte `offset` of the file on."""

    dtype: str
    offset: int
    count: int

    @property
    def itemsize(self) -> int:
        return AGGREGATED[self.dtype]


@dataclass(frozen=True)
class Layout:
    """What all files of a round share: the header, byte for byte, and the runs behind it."""

    header: bytes
    runs: tuple[Run, ...]
    size: int
    tensors: tuple[TensorInfo, ...]

    def locate(self, offset: int) -> str:
        """The tensor that byte `offset` of the file belongs to."""
        return next(
            tensor.name
            for tensor in self.tensors
            if tensor.offset <= offset < tensor.offset + tensor.nbytes
        )


def parse_layout(header: bytes, size: int) -> Layout:
    """Of a file's whole header, its eight length bytes included; raises `BadContainer`."""
    manifest = parse(BytesIO(header), size, Limits(header_bytes=MAX_HEADER))
    runs = []
    for dtype, group in groupby(manifest.tensors, key=lambda tensor: tensor.dtype):
        if dtype not in AGGREGATED:
            raise AggregationException(f"tensors of dtype {dtype} cannot be aggregated")
        tensors = list(group)
        nbytes = sum(tensor.nbytes for tensor in tensors)
        if nbytes:
            runs.append(Run(dtype, tensors[0].offset, nbytes // AGGREGATED[dtype]))
    return Layout(header, tuple(runs), size, manifest.tensors)


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

    Raises `UpdateChanged` as soon as the file is missing, shorter, or touched since it was opened. A second name that
    comes or goes, as an upload's does, is no touch; whether bytes have changed with it only a digest can tell.
    """

    def __init__(self, path: Path, participant: str, *, keep_open: bool = True) -> None:
        self.path = path
        self.participant = participant
        self._fd: int | None = None
        fd = self._open()
        try:
            self._stat = os.fstat(fd)
            self.size = self._stat.st_size
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

    @property
    def fd(self) -> int | None:
        """The open file, which holds the very numbers; None where each read opens it, or works them out.

        With one, single numbers cost no more than a call each.
        """
        return self._fd

    def read_each(self, offsets: Sequence[int], size: int) -> bytes:
        """`size` bytes from each of the offsets on, one after the other."""
        if self._fd is None:
            data = memoryview(bytearray(size * len(offsets)))
            for index, offset in enumerate(offsets):
                self.read_into(data[index * size : (index + 1) * size], offset)
            return bytes(data)
        found = b"".join([os.pread(self._fd, size, offset) for offset in offsets])
        if len(found) < size * len(offsets):
            raise UpdateChanged(self.participant, "has become shorter")
        return found

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
        was, now = self._stat, os.fstat(fd)
        same = (was.st_ino, was.st_size, was.st_mtime_ns) == (
            now.st_ino,
            now.st_size,
            now.st_mtime_ns,
        )
        # Programs can set mtime, not ctime; but that changes with the number of names as well.
        renamed = 0 < now.st_nlink != was.st_nlink
        if not same or (was.st_ctime_ns != now.st_ctime_ns and not renamed):
            raise UpdateChanged(
                self.participant, "was written to, replaced or removed during the aggregation"
            )

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


class Target(Protocol):
    """What blocks are written to, each at its place in the whole file."""

    def write(self, data: bytes | memoryview, offset: int) -> None: ...


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
            if size:
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


def layout_of(source: Source) -> Layout:
    """`UpdateChanged` if the file is not whole: it was when it was accepted."""
    try:
        return parse_layout(source.header, source.size)
    except BadContainer as error:
        raise UpdateChanged(source.participant, f"cannot be read: {error.detail}") from None


def assert_same_header(sources: Sequence[Source], layout: Layout) -> None:
    """Name the first participant whose tensors are not the others', and how they differ."""
    for source in sources:
        if source.header != layout.header:
            raise AggregationException(
                f"the update of participant {source.participant} cannot be combined: "
                f"{_difference(layout, layout_of(source))}"
            )
        if source.size != layout.size:
            raise UpdateChanged(
                source.participant, f"has {source.size} bytes, its header says {layout.size}"
            )


def _difference(expected: Layout, given: Layout) -> str:
    ours = {tensor.name: tensor for tensor in expected.tensors}
    theirs = {tensor.name: tensor for tensor in given.tensors}
    for name in ours | theirs:
        if name not in theirs:
            return f"tensor {name!r} is missing"
        if name not in ours:
            return f"tensor {name!r} is not in the other files"
        a, b = ours[name], theirs[name]
        if a.dtype != b.dtype:
            return f"tensor {name!r} has dtype {b.dtype}, not {a.dtype}"
        if a.shape != b.shape:
            return f"tensor {name!r} has shape {list(b.shape)}, not {list(a.shape)}"
    return "its header is not in canonical form"
