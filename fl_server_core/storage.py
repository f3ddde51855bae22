"""Where weights live: files that are durable before anybody hears of them."""

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast

from django.conf import settings
from django.core.files import File
from django.core.files.storage import FileSystemStorage, Storage, storages

from fl_server_core.exceptions import OutOfSpace
from fl_server_core.killpoints import around, reached

if TYPE_CHECKING:
    from fl_server_core.models.weights import Blob


def fsync_dir(path: Path) -> None:
    """Make the names in a directory durable; a file's own fsync doesn't."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class DurableStorage(FileSystemStorage):
    """Files appear under their final name complete and synced, or not at all."""

    def adopt(self, source: Path, name: str, *, synced: bool = True) -> None:
        """Take over a file of the same file system by renaming it; the name is durable if it was `synced`."""
        target = Path(self.path(name))
        if not target.parent.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            fsync_dir(target.parent.parent)
        with around("file.rename"):
            source.replace(target)
        if synced:
            fsync_dir(target.parent)
            reached("file.synced")

    def sync(self, name: str) -> None:
        """Make durable what was adopted unsynced; FileNotFoundError if it is gone."""
        path = Path(self.path(name))
        with path.open("rb") as file:
            os.fsync(file.fileno())
        fsync_dir(path.parent)


def weights_storage() -> Storage:
    """The storage that `STORAGES["weights"]` names."""
    return storages["weights"]


def has_paths() -> bool:
    """Whether stored files lie on this machine, so that a part of one costs a part only."""
    return isinstance(weights_storage(), FileSystemStorage)


def out_of_space(error: OSError) -> bool:
    """Whether the disk or a quota is full, or the file larger than files may be here (`ulimit -f`)."""
    return error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def needs_room(said: str = "the server's disk is full; nothing was stored") -> Iterator[None]:
    """A full disk in the block is `OutOfSpace`."""
    try:
        yield
    except OSError as error:
        if out_of_space(error):
            raise OutOfSpace(said) from error
        raise


def write_all(file: IO[bytes], block: bytes) -> None:
    """Every byte to an unbuffered file; where the disk is full, the first ones are there."""
    view = memoryview(block)
    while view:
        view = view[file.write(view) :]


def staging_path(suffix: str = "") -> Path:
    """A fresh name for an unfinished file; what a kill leaves there is swept by age."""
    folder = Path(settings.FL_STAGING_DIR)
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{uuid.uuid4().hex}{suffix}"


def store(source: Path, *, digest: str, suffix: str = ".safetensors", synced: bool = True) -> str:
    """Move a staging file into the storage and return its name there.

    The name holds the digest, and a random part that makes the file its row's own: deleting one
    never takes bytes away from another.
    """
    name = f"{digest[:2]}/{digest}-{uuid.uuid4().hex[:12]}{suffix}"
    storage = weights_storage()
    if isinstance(storage, DurableStorage):
        storage.adopt(source, name, synced=synced)
        return name
    with source.open("rb") as handle:
        name = storage.save(name, File(handle))
    source.unlink()
    return name


@contextmanager
def local_path(blob: "Blob") -> Iterator[Path]:
    """A path to read the blob at; a storage without paths is copied to staging for as long."""
    storage = weights_storage()
    if isinstance(storage, FileSystemStorage):
        yield Path(storage.path(blob.name))
        return
    copy = staging_path(".copy")
    try:
        with storage.open(blob.name) as remote, copy.open("wb") as local:
            shutil.copyfileobj(cast("File[bytes]", remote), local, 2**20)
        yield copy
    finally:
        copy.unlink(missing_ok=True)
