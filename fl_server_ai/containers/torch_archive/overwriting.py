"""New numbers into a copy of the archive that was uploaded: everything else stays as torch wrote it."""

import mmap
import os
import shutil
import struct
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import numpy as np

from fl_server_ai.containers.canonical import DTYPE_BYTES, TensorInfo, read_manifest
from fl_server_ai.containers.limits import Limits
from fl_server_ai.containers.torch_archive.archive import crc_of
from fl_server_ai.containers.torch_archive.reading import (
    BYTES,
    Weights,
    mapped,
    open_weights,
    parts,
)
from fl_server_ai.containers.torch_archive.tensors import View
from fl_server_ai.containers.writing import read_blocks
from fl_server_core.exceptions import BadContainer, Unusable


def overwrite(template: Path, canonical: Path, out: Path) -> None:
    """Write `out`: the archive `template` with the canonical weights in the places of its own.

    Storage layout, alignment, ties and the program stay; the CRCs of changed entries are set anew in
    both their places. Not synced. Raises `Unusable` if the weights are not the template's tensors.
    """
    limits = Limits()
    manifest = read_manifest(canonical)
    infos = {info.name: info for info in manifest.tensors}
    with open_weights(template, limits) as old:
        if sorted(old.layout()) != sorted(manifest.layout()):
            raise Unusable(
                "the weights are not those of the uploaded archive", code="NOT_REPRESENTABLE"
            )
        shutil.copyfile(template, out)
        with canonical.open("rb", buffering=0) as source, out.open("r+b", buffering=0) as target:
            written: set[View] = set()
            for name, view in old.views.items():
                if view not in written and view.count:
                    written.add(view)
                    _overwrite(source, infos[name], target, old, view)
            for entry in old.storages():
                crc = struct.pack("<L", crc_of(target, entry))
                for place in entry.crc_places:
                    os.pwrite(target.fileno(), crc, place)


def _overwrite(
    source: BinaryIO, info: TensorInfo, target: BinaryIO, old: Weights, view: View
) -> None:
    entry = old.entry(view)
    if view.contiguous:
        at = entry.start + view.offset
        for block in read_blocks(source, info.offset, info.nbytes):
            at += os.pwrite(target.fileno(), block, at)
        return
    width = BYTES[DTYPE_BYTES[view.dtype]]
    source.seek(info.offset)
    for part in parts(mapped(target, entry, view, mmap.ACCESS_WRITE)):
        part[...] = np.frombuffer(source.read(part.nbytes), width).reshape(part.shape)


def check_overwritable(weights: Weights, folder: Path) -> None:
    """`BadContainer` (OVERLAPPING_TENSORS) if two different tensors share some of their numbers.

    Such an archive can be read, but cannot be given other weights. Equal tensors, which are tied, can.
    `folder` is for an unlinked scratch file, where strides alone can't tell.
    """
    by_key: dict[str, list[View]] = {}
    for view in dict.fromkeys(weights.views.values()):
        if view.count:
            by_key.setdefault(view.key, []).append(view)
    for key, views in by_key.items():
        views.sort(key=lambda view: view.span)
        apart = all(first.span[1] <= second.span[0] for first, second in pairwise(views))
        if not (apart and all(view.distinct for view in views)) and _overlap(
            weights.archive.storage(key).size, views, folder
        ):
            names = [name for name, view in weights.views.items() if view.key == key]
            raise BadContainer(
                f"tensors {', '.join(map(repr, names[:3]))} share some of their numbers, so that they "
                "can't be given new ones; clone() them before saving",
                code="OVERLAPPING_TENSORS",
            )


def _overlap(size: int, views: list[View], folder: Path) -> bool:
    """Paint each tensor's bytes onto a canvas of zeros: fewer are painted than written if they overlap."""
    with tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(
            file.fileno(), 0, size
        )  # a full disk is an error here, not a signal later
        canvas = mmap.mmap(file.fileno(), size)
        for view in views:
            width = BYTES[DTYPE_BYTES[view.dtype]]
            painted = np.ndarray(view.shape, width, canvas, view.offset, view.strides)
            painted[...] = 256**painted.itemsize - 1  # all bits, so that every byte counts
        whole = np.frombuffer(canvas, np.uint8)
        count = sum(int(np.count_nonzero(part)) for part in parts(whole))
        return count != sum(view.nbytes for view in views)
