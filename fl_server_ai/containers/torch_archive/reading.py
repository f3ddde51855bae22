"""A torch archive's tensors by name, and their numbers in C order, in constant memory."""

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fl_server_ai.containers.canonical import DTYPE_BYTES
from fl_server_ai.containers.limits import Limits
from fl_server_ai.containers.torch_archive.archive import (
    Archive,
    Entry,
    checked_blocks,
    open_archive,
)
from fl_server_ai.containers.torch_archive.exports import FORMAT, exported_views
from fl_server_ai.containers.torch_archive.names import named_views, of_module, of_saved
from fl_server_ai.containers.torch_archive.pickles import interpret
from fl_server_ai.containers.torch_archive.scripts import Classes
from fl_server_ai.containers.torch_archive.tensors import View
from fl_server_ai.containers.writing import BLOCK, read_blocks
from fl_server_core.exceptions import BadContainer, TooLarge

# numpy moves bytes; what they mean is nobody's business here.
BYTES = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclass(frozen=True)
class Weights:
    """What an archive holds: each named tensor's place in it."""

    archive: Archive
    views: dict[str, View]

    def entry(self, view: View) -> Entry:
        """The archive's entry that the tensor lies in."""
        return self.archive.storage(view.key)

    def layout(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """Name, dtype and shape of each tensor."""
        return [(name, view.dtype, view.shape) for name, view in self.views.items()]

    def storages(self) -> list[Entry]:
        """Those that some tensor lies in, each once."""
        return [
            self.archive.storage(key) for key in {view.key: None for view in self.views.values()}
        ]

    def ties(self) -> tuple[tuple[str, ...], ...]:
        """Groups of names for one and the same numbers."""
        groups: dict[View, list[str]] = {}
        for name, view in self.views.items():
            groups.setdefault(view, []).append(name)
        return tuple(
            tuple(names) for view, names in groups.items() if len(names) > 1 and view.count
        )


@contextmanager
def open_weights(path: Path, limits: Limits) -> Iterator[Weights]:
    """What the archive's program says, checked; the numbers are not read, and their CRCs not either."""
    with open_archive(path, limits) as archive:
        order = archive.read("byteorder", 16) if "byteorder" in archive.entries else b"little"
        if order != b"little":
            raise BadContainer("the file was written on a big-endian machine; convert it first")
        views = exported_views(archive) if FORMAT in archive.entries else _pickled_views(archive)
        weights = Weights(archive, views)
        unpacked = sum(view.nbytes for view in weights.views.values())
        packed = path.stat().st_size
        # Views may repeat numbers: a kilobyte could spell a terabyte.
        if unpacked > min(limits.file_bytes, max(limits.npz_free, limits.npz_ratio * packed)):
            raise TooLarge(f"{packed:,} bytes hold tensors of {unpacked:,} bytes")
        yield weights


def _pickled_views(archive: Archive) -> dict[str, View]:
    program = interpret(archive.read("data.pkl", archive.limits.pickle_bytes))
    if "constants.pkl" in archive.entries:
        interpret(archive.read("constants.pkl", archive.limits.pickle_bytes))
        classes = Classes(archive)
        return named_views(of_module(classes.root(program), classes.members), archive)
    return named_views(of_saved(program), archive)


def view_blocks(weights: Weights, name: str) -> Iterator[bytes | memoryview]:
    """A tensor's numbers, C order, little-endian; with a CRC that is right if it fills its storage."""
    view, entry = weights.views[name], weights.entry(weights.views[name])
    if fills(view, entry):
        yield from checked_blocks(weights.archive.file, entry)
    elif view.contiguous:
        yield from read_blocks(weights.archive.file, entry.start + view.offset, view.nbytes)
    else:
        for part in parts(mapped(weights.archive.file, entry, view, mmap.ACCESS_READ)):
            yield part.tobytes()


def check_others(weights: Weights) -> None:
    """Check the CRCs of storages that no tensor fills, which `view_blocks` therefore does not check."""
    views = weights.views.values()
    filled = {view.key for view in views if fills(view, weights.entry(view))}
    for key in {view.key for view in views} - filled:
        for _ in checked_blocks(weights.archive.file, weights.archive.storage(key)):
            pass


def fills(view: View, entry: Entry) -> bool:
    """Whether the tensor is the whole storage, from its first byte to its last."""
    return view.contiguous and view.offset == 0 and view.nbytes == entry.size


def mapped(file: BinaryIO, entry: Entry, view: View, access: int) -> np.ndarray[Any, Any]:
    """The tensor's numbers in the file itself, as unsigned integers of the same width."""
    low, high = view.span
    begin = entry.start + low
    page = begin - begin % mmap.ALLOCATIONGRANULARITY
    # Not closed here: it lives as long as the array. numpy checks that the strides stay within it.
    mapping = mmap.mmap(file.fileno(), entry.start + high - page, access=access, offset=page)
    width = BYTES[DTYPE_BYTES[view.dtype]]
    return np.ndarray(view.shape, width, mapping, begin - page, view.strides)


def parts(array: np.ndarray[Any, Any]) -> Iterator[np.ndarray[Any, Any]]:
    """An array in C order, in pieces of at most a block."""
    if array.nbytes <= BLOCK or not array.ndim:
        yield array
        return
    step = max(BLOCK * len(array) // array.nbytes, 1)
    for start in range(0, len(array), step):
        piece = array[start : start + step]
        if piece.nbytes <= BLOCK:
            yield piece
        else:  # a single row
            yield from parts(piece[0])
