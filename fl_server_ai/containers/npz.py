"""Numpy's zip archives: plain arrays only, nothing unpickled, in constant memory."""

import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy_format

from fl_server_ai.containers.canonical import read_manifest
from fl_server_ai.containers.container import CONTAINERS, Container
from fl_server_ai.containers.header import check_name
from fl_server_ai.containers.limits import Limits
from fl_server_ai.containers.npy import NUMPY, SAFETENSORS, Array, read_array
from fl_server_ai.containers.unread import torch_kind
from fl_server_ai.containers.writing import BLOCK, read_blocks, write_canonical
from fl_server_ai.containers.zips import MAGIC, opened
from fl_server_core.exceptions import BadContainer, TooLarge, Unusable


@CONTAINERS.register("npz")
class Npz(Container):
    """`layer.npy` in the archive is the tensor `layer`; zipfile checks every CRC as it reads."""

    name = "npz"

    def matches(self, head: bytes, path: Path) -> bool:
        return head[:4] in MAGIC and torch_kind(head, path) is None

    def extract(self, source: Path, target: Path, limits: Limits) -> str:
        with opened(source, limits) as archive:
            infos = archive.infolist()
            _check_size(infos, source.stat().st_size, limits)
            entries = [_Entry(archive, info, target.parent, limits) for info in infos]
            found = {entry.name: entry for entry in entries}
            layout = [
                (entry.name, SAFETENSORS[entry.array.dtype], entry.array.shape) for entry in entries
            ]
            return write_canonical(target, layout, lambda name: found[name].blocks())

    def write(self, canonical: Path, out: Path, template: Path | None = None) -> None:
        manifest = read_manifest(canonical)
        for tensor in manifest.tensors:
            if tensor.dtype not in NUMPY:
                raise Unusable(
                    f"numpy has no dtype for tensor {tensor.name!r} ({tensor.dtype}); "
                    "ask for safetensors",
                    code="NOT_REPRESENTABLE",
                )
        with (
            canonical.open("rb", buffering=0) as file,
            zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive,
        ):
            for tensor in manifest.tensors:
                entry = zipfile.ZipInfo(f"{tensor.name}.npy", (1980, 1, 1, 0, 0, 0))
                with archive.open(entry, "w", force_zip64=True) as part:
                    header = {
                        "descr": npy_format.dtype_to_descr(NUMPY[tensor.dtype]),
                        "fortran_order": False,
                        "shape": tensor.shape,
                    }
                    npy_format.write_array_header_1_0(part, header)
                    for block in read_blocks(file, tensor.offset, tensor.nbytes):
                        part.write(block)


def _check_size(infos: list[zipfile.ZipInfo], packed: int, limits: Limits) -> None:
    unpacked = sum(info.file_size for info in infos)
    if unpacked > limits.file_bytes:
        raise TooLarge(f"the arrays unpack to more than {limits.file_bytes:,} bytes")
    if unpacked > max(limits.npz_free, limits.npz_ratio * packed):
        raise TooLarge(
            f"{packed:,} bytes claim to unpack to {unpacked:,}, more than {limits.npz_ratio} times"
        )


class _Entry:
    """One `.npy` file in the archive: its header read and checked, its data not."""

    def __init__(
        self, archive: zipfile.ZipFile, info: zipfile.ZipInfo, folder: Path, limits: Limits
    ) -> None:
        self.archive, self.info, self.folder, self.limits = archive, info, folder, limits
        self.name = info.filename.removesuffix(".npy")
        if self.name == info.filename:
            raise BadContainer(f"{info.filename[:64]!r} in the archive is no .npy array")
        check_name(self.name, limits)
        with archive.open(info) as file:
            self.array: Array = read_array(file, self.name, limits)
        if self.array.header_bytes + self.array.nbytes != info.file_size:
            raise BadContainer(
                f"tensor {self.name!r} of shape {list(self.array.shape)} needs "
                f"{self.array.nbytes:,} bytes; its entry claims {info.file_size:,} with the header"
            )

    def blocks(self) -> Iterator[bytes | memoryview]:
        """The data in C order and little-endian."""
        with self.archive.open(self.info) as file:
            file.read(self.array.header_bytes)
            yield from self._transposed(file) if self.array.fortran else self._stream(file)

    def _stream(self, file: IO[bytes]) -> Iterator[bytes]:
        left = self.array.nbytes
        while left > 0:
            block = file.read(min(BLOCK, left))
            if not block or len(block) % self.array.stored.itemsize:
                raise BadContainer(f"tensor {self.name!r} is cut off")
            left -= len(block)
            if self.array.stored != self.array.dtype:
                block = np.frombuffer(block, self.array.stored).astype(self.array.dtype).tobytes()
            yield block
        file.read(1)  # an empty array's CRC is checked at its end only

    def _transposed(self, file: IO[bytes]) -> Iterator[bytes]:
        """Fortran order goes through an unlinked file next to the target: a tensor may not fit memory."""
        with tempfile.TemporaryFile(dir=self.folder) as scratch:
            for block in self._stream(file):
                scratch.write(block)
            scratch.flush()
            if self.array.nbytes:
                array = np.memmap(
                    scratch, self.array.dtype, mode="r", shape=self.array.shape, order="F"
                )
                yield from _in_c_order(array)


def _in_c_order(array: np.ndarray[Any, Any]) -> Iterator[bytes]:
    """Slices along the first axis of at most a block each, or slices of slices where one is larger."""
    if array.nbytes <= BLOCK:
        yield array.tobytes()
        return
    step = max(BLOCK * len(array) // array.nbytes, 1)
    for start in range(0, len(array), step):
        part = array[start : start + step]
        if part.nbytes <= BLOCK:
            yield part.tobytes()
        else:  # a single slice
            yield from _in_c_order(part[0])
