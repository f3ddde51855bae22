"""Writing canonical files: tensor by tensor, in constant memory, hashed on the way."""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from fl_server_ai.containers.canonical import canonical_header
from fl_server_core.exceptions import BadContainer

BLOCK = 2**20  # bytes; a block and its scratch space fit a core's cache


def read_blocks(file: BinaryIO, offset: int, nbytes: int) -> Iterator[memoryview]:
    """A range of an unbuffered file, in blocks of one reused buffer, each full but the last."""
    buffer = memoryview(bytearray(min(BLOCK, nbytes)))
    file.seek(offset)
    while nbytes > 0:
        block = buffer[:nbytes]
        filled = 0
        while filled < len(block):
            count = file.readinto(block[filled:])  # type: ignore[attr-defined]
            if not count:
                raise BadContainer("the file ends within a tensor")
            filled += count
        yield block
        nbytes -= filled


def write_canonical(
    target: Path,
    layout: Iterable[tuple[str, str, tuple[int, ...]]],
    blocks: Callable[[str], Iterable[bytes | memoryview]],
) -> str:
    """Write a new canonical file of these tensors, synced; its SHA-256 (hexadecimal).

    `blocks(name)` gives a tensor's bytes, C order and little-endian, in pieces that are used up before
    the next is asked for. `FileExistsError` if there is a target; on any other error there is none after.
    """
    header, infos = canonical_header(layout)
    with _new_file(target) as file, _Behind(file, header) as behind:
        _write(file, header)
        for info in infos:
            left = info.nbytes
            for block in blocks(info.name):
                left -= len(block)
                if left < 0:
                    break
                behind.hash(block)
                _write(file, block)
                behind.sync(len(block))
            if left:
                raise BadContainer(f"tensor {info.name!r} has not as many bytes as its shape needs")
    return behind.digest()


class _Behind:
    """Hashes and syncs on two threads while the file is written: all of it then takes about one write."""

    BLOCKS = 4  # that may wait to be hashed
    SYNCED = 32 * 2**20  # bytes

    def __init__(self, file: BinaryIO, first: bytes) -> None:
        self._file = file
        self._hash = hashlib.sha256(first)
        self._hashing, self._syncing = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._waiting: deque[Future[None]] = deque()
        self._unsynced = 0

    def __enter__(self) -> "_Behind":
        return self

    def __exit__(self, *_: object) -> None:
        self._hashing.shutdown()
        self._syncing.shutdown(cancel_futures=True)

    def hash(self, block: bytes | memoryview) -> None:
        self._waiting.append(self._hashing.submit(self._hash.update, bytes(block)))
        if len(self._waiting) > self.BLOCKS:
            self._waiting.popleft().result()

    def sync(self, count: int) -> None:
        """A head start for the disk; what counts is the sync at the end."""
        self._unsynced += count
        if self._unsynced >= self.SYNCED:
            self._unsynced = 0
            self._syncing.submit(os.fdatasync, self._file.fileno())

    def digest(self) -> str:
        """Hexadecimal; after the end of the `with`."""
        return self._hash.hexdigest()


@contextmanager
def _new_file(target: Path) -> Iterator[BinaryIO]:
    with target.open("xb", buffering=0) as file:
        try:
            yield file
            os.fsync(file.fileno())
        except BaseException:
            target.unlink(missing_ok=True)
            raise


def _write(file: BinaryIO, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
