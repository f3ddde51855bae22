"""Writing canonical files tensor by tensor, in whatever order they come, in constant memory."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from fl_server_ai.containers.canonical import canonical_header
from fl_server_core.exceptions import BadContainer

BLOCK = 4 * 2**20


def copy_range(file: BinaryIO, offset: int, nbytes: int) -> Iterator[memoryview]:
    """The bytes of a range, in blocks of one reused buffer."""
    buffer = memoryview(bytearray(min(BLOCK, max(nbytes, 1))))
    file.seek(offset)
    while nbytes > 0:
        count = file.readinto(buffer[: min(nbytes, len(buffer))])  # type: ignore[attr-defined]
        if not count:
            raise BadContainer("the file ends within a tensor")
        yield buffer[:count]
        nbytes -= count


class CanonicalWriter:
    """A new canonical file; synced when all tensors are in, deleted if anything goes wrong before."""

    def __init__(self, target: Path, layout: Iterable[tuple[str, str, tuple[int, ...]]]) -> None:
        self.target = target
        header, infos = canonical_header(layout)
        self._places = {info.name: info for info in infos}
        self._file = target.open("xb")
        self._file.write(header)

    def write(self, name: str, blocks: Iterable[bytes | memoryview]) -> None:
        """Put a tensor's bytes in their place; they must be exactly as many as its shape says."""
        place = self._places.pop(name)
        self._file.seek(place.offset)
        left = place.nbytes
        for block in blocks:
            left -= len(block)
            if left < 0:
                break
            self._file.write(block)
        if left:
            raise BadContainer(f"tensor {name!r} has not as many bytes as its shape needs")

    def __enter__(self) -> "CanonicalWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._file.close()
            if error is not None:
                self.target.unlink(missing_ok=True)
