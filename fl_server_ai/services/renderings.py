"""Weights in the container that a client knows: made once for all who ask, and kept until others are wanted more.

Only a cache, next to the unfinished files: it may be lost at any time.
"""

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fl_server_core.storage import staging_path

KEPT = 8 * 2**30  # bytes; beyond them all but the newest go, the least recently used first
FOLDER = "rendered"


@contextmanager
def rendering(key: str, make: Callable[[Path], None]) -> Iterator[tuple[Path, str]]:
    """A file of the key's bytes and its SHA-256; `make(path)` writes it where it isn't there yet.

    One maker at a time, over all processes; the others wait for its file. The path is the caller's own
    until the end of the context. A kill leaves files that the sweep removes by age.
    """
    own = staging_path(".rendered")
    try:
        with _locked(key):
            digest = _take(key, own)
            if digest is None:
                make(own)
                digest = _sha256(own)
                _offer(own, key, digest)
        yield own, digest
    finally:
        own.unlink(missing_ok=True)


@contextmanager
def _locked(key: str) -> Iterator[None]:
    folder = _folder()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{key}.lock"
    with path.open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.utime(lock.fileno())  # the sweep deletes by age
        yield


def _take(key: str, own: Path) -> str | None:
    """Link the kept file to `own`; its size and digest are in its name."""
    for kept in _folder().glob(f"{key}.sha256-*"):
        with suppress(OSError):  # deleted just now, or a file system without links
            os.link(kept, own)
            os.utime(own)
            _, size, digest = kept.name.rsplit("-", 2)
            if own.stat().st_size == int(size):
                return digest
            own.unlink()  # cut off by a lost machine
            kept.unlink(missing_ok=True)
    return None


def _offer(own: Path, key: str, digest: str) -> None:
    with suppress(OSError):
        with own.open("rb") as file:
            os.fsync(file.fileno())  # a name that outlives its bytes would be served as they were
        os.link(own, _folder() / f"{key}.sha256-{own.stat().st_size}-{digest}")
    found = []
    for path in _folder().glob("*.sha256-*"):
        with suppress(FileNotFoundError):
            status = path.stat()
            found.append((status.st_mtime, status.st_size, path))
    total = 0
    for _, size, path in sorted(found, reverse=True):
        total += size
        if total > max(KEPT, size):
            path.unlink(missing_ok=True)


def _folder() -> Path:
    return staging_path().with_name(FOLDER)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
