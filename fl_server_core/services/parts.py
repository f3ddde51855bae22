"""The bytes of an upload that have arrived: one file, one writer at a time, the newest one wins."""

import fcntl
import hashlib
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from django.conf import settings

from fl_server_core.exceptions import Conflict, NotFound
from fl_server_core.storage import fsync_dir, needs_room, write_all

FULL = "the server's disk is full; what has arrived is kept, go on when there is room"
REFRESH = 3600.0  # seconds; `files_sweep` takes what is a day old
ALL = "all"
MARK = 53  # bytes: who writes, and how many count


class Parts:
    """An upload's file. Its size is how much has arrived; a kill at any time leaves it usable.

    A connection that is dead for the client may look alive to the server for minutes. So nobody waits
    for the former writer: each new one leaves its mark, and whoever finds another's mark stops. The mark also
    says how many bytes count, where what follows is not checked yet. It is as long as ever, and written over in
    its place: for that a full disk has room.
    """

    def __init__(self, upload_id: uuid.UUID) -> None:
        self.path = self.folder() / f"{upload_id}.part"
        self._mark = self.folder() / f"{upload_id}.writer"
        self._me = uuid.uuid4().hex

    @staticmethod
    def folder() -> Path:
        folder = Path(settings.FL_STAGING_DIR) / "uploads"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def create(self) -> None:
        """An empty file and its mark, whose names survive a power cut."""
        self._sign()
        with needs_room():
            self.path.touch(exist_ok=False)
            fsync_dir(self.path.parent)

    def size(self) -> int:
        """How many bytes are here, without stopping anybody; 0 if the file is gone."""
        try:
            return self.path.stat().st_size
        except FileNotFoundError:
            return 0

    def touched(self) -> datetime | None:
        """When the last byte came; None if the file is gone."""
        try:
            return datetime.fromtimestamp(self.path.stat().st_mtime, UTC)
        except FileNotFoundError:
            return None

    def stop_others(self) -> int:
        """Become the only writer; returns how many bytes are here, on disk and not only in memory.

        What the former writer meant to add whole, and has not, is gone.
        """
        with self._locked() as file:
            return self._keep(file, self._read()[1])

    @contextmanager
    def writing(self) -> Iterator[Callable[[bytes], None]]:
        """A function that appends; synced at the end, however it comes. `Conflict` once another has taken over."""
        with self._open() as file:
            file.seek(0, os.SEEK_END)

            def write(block: bytes) -> None:
                with _lock(file):
                    self._check()
                    self._refresh()
                    with needs_room(FULL):
                        write_all(file, block)

            try:
                yield write
            finally:
                with needs_room(FULL):
                    os.fsync(file.fileno())

    @contextmanager
    def whole(self) -> Iterator[None]:
        """What is appended in the block counts from its end on; an error, a kill or another writer takes it back."""
        with self._locked() as file:
            self._check()
            size = file.seek(0, os.SEEK_END)
            self._sign(size)
        try:
            yield
        except BaseException:
            with self._locked() as file:
                if self._mine():
                    self._keep(file, size)
            raise
        with self._locked() as file:
            self._check()
            self._keep(file, None)

    def sha256(self) -> str:
        """Of all the bytes (hexadecimal)."""
        with self._open() as file:
            return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]

    def link(self, other: Path) -> None:
        """A second name for the bytes, which outlives this one. They are new from now on: no sweep takes them for left.

        Who asks again after a kill may find them stored already, under a third name. Their time stays then, as long
        as no sweep is near: who reads a stored file would take it for changed.
        """
        try:
            found = self.path.stat()
            if found.st_nlink == 1 or found.st_mtime < time.time() - REFRESH:
                os.utime(self.path)
            other.hardlink_to(self.path)
        except FileNotFoundError as error:
            raise gone() from error

    def delete(self) -> None:
        """Nothing is left; again, nothing happens."""
        self.path.unlink(missing_ok=True)
        self._mark.unlink(missing_ok=True)

    @contextmanager
    def _locked(self) -> Iterator[IO[bytes]]:
        with self._open() as file, _lock(file):
            yield file

    def _open(self) -> IO[bytes]:
        try:
            return self.path.open("r+b", buffering=0)
        except FileNotFoundError as error:
            raise gone() from error

    def _keep(self, file: IO[bytes], counted: int | None) -> int:
        """Of what is here only the first `counted` bytes (None: all) stay, for good; how many that are."""
        size = file.seek(0, os.SEEK_END)
        if counted is not None and counted < size:
            size = file.truncate(counted)
        with needs_room(FULL):
            os.fsync(file.fileno())
        self._sign()
        return size

    def _sign(self, counted: int | None = None) -> None:
        """Leave our mark over the last one; it is durable where one of them does not count all bytes."""
        durable = counted is not None or self._read()[1] is not None
        fd = os.open(self._mark, os.O_WRONLY | os.O_CREAT, 0o600)
        with os.fdopen(fd, "wb", buffering=0) as file, needs_room(FULL):
            write_all(file, f"{self._me} {ALL if counted is None else counted:>20}".encode())
            if durable:
                os.fsync(fd)

    def _refresh(self) -> None:
        """Who writes for days must not look as if a kill had left the mark."""
        if self._mark.stat().st_mtime < time.time() - REFRESH:
            os.utime(self._mark)

    def _read(self) -> tuple[str, int | None]:
        """Whose mark it is, and how many bytes count; None for all."""
        try:
            with self._mark.open("rb", buffering=0) as file:
                writer, _, counted = file.read(MARK).decode("ascii", "replace").partition(" ")
        except FileNotFoundError:
            return "", None
        return writer, int(counted) if counted.strip().isdecimal() else None

    def _mine(self) -> bool:
        return self._read()[0] == self._me

    def _check(self) -> None:
        if not self._mine():
            raise Conflict("another request goes on with this upload", code="UPLOAD_TAKEN_OVER")


def gone() -> NotFound:
    """The row is there, the file isn't any more."""
    return NotFound("this upload was used, deleted, or is too old; begin anew", code="UPLOAD_GONE")


@contextmanager
def _lock(file: IO[bytes]) -> Iterator[None]:
    fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)
