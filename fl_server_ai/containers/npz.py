"""Numpy's zip archives: plain arrays only, their headers read as literals, nothing unpickled."""

import ast
import math
import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy

from fl_server_ai.containers.canonical import (
    check_name,
    check_shape,
    read_manifest,
)
from fl_server_ai.containers.limits import Limits
from fl_server_ai.containers.writing import BLOCK, CanonicalWriter, copy_range
from fl_server_core.exceptions import BadContainer, TooLarge, Unusable

NUMPY: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype("?"), "U8": np.dtype("u1"), "I8": np.dtype("i1"), "I16": np.dtype("<i2"),
    "U16": np.dtype("<u2"), "F16": np.dtype("<f2"), "I32": np.dtype("<i4"), "U32": np.dtype("<u4"),
    "F32": np.dtype("<f4"), "C64": np.dtype("<c8"), "F64": np.dtype("<f8"), "I64": np.dtype("<i8"),
    "U64": np.dtype("<u8"),
}  # fmt: skip
SAFETENSORS = {dtype: name for name, dtype in NUMPY.items()}
MAX_NPY_HEADER = 10_000
BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, ValueError, OverflowError)


@contextmanager
def _archive(source: Path) -> Iterator[zipfile.ZipFile]:
    """Whatever is wrong with an archive becomes `BadContainer`; zipfile checks every CRC as it reads."""
    try:
        with zipfile.ZipFile(source) as archive:
            yield archive
    except (*BROKEN, RuntimeError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise BadContainer(f"a damaged archive: {str(error)[:200]}") from error


class _Entry:
    """One `.npy` file in the archive: its header read and checked, its data not."""

    def __init__(self, archive: zipfile.ZipFile, info: zipfile.ZipInfo, limits: Limits) -> None:
        self.archive, self.info = archive, info
        self.name = check_name(info.filename.removesuffix(".npy"), limits)
        if not info.filename.endswith(".npy"):
            raise BadContainer(f"{info.filename[:64]!r} in the archive is no .npy array")
        if info.flag_bits & 1:
            raise BadContainer(f"{self.name!r} is encrypted")
        if info.compress_type not in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
            raise BadContainer(f"{self.name!r} is compressed in a way that is not read here")
        if info.file_size > limits.inflation * max(info.compress_size, 1):
            raise BadContainer(f"{self.name!r} claims to inflate beyond what deflate can do")
        with archive.open(info) as file:
            shape, self.fortran, dtype = _header(file, self.name)
        self.dtype = dtype.newbyteorder("<")
        if self.dtype not in SAFETENSORS:
            raise BadContainer(f"tensor {self.name!r} has the dtype {dtype}, which is not taken")
        self.swapped = self.dtype != dtype
        self.shape = check_shape(self.name, shape, limits)
        self.nbytes = math.prod(self.shape) * self.dtype.itemsize
        if self.nbytes > info.file_size:
            raise BadContainer(f"tensor {self.name!r} claims more bytes than its entry has")

    @property
    def layout(self) -> tuple[str, str, tuple[int, ...]]:
        return self.name, SAFETENSORS[self.dtype], self.shape

    def blocks(self) -> Iterator[bytes | memoryview]:
        """The data in C order and little-endian; Fortran order needs the whole tensor at once."""
        with self.archive.open(self.info) as file:
            _header(file, self.name)
            if self.fortran and len(self.shape) > 1:
                flat = np.frombuffer(file.read(self.nbytes), self._stored)
                array = flat.reshape(self.shape, order="F").astype(self.dtype)
                yield np.ascontiguousarray(array).tobytes()
            else:
                yield from self._stream(file)
            if file.read(1):
                raise BadContainer(f"tensor {self.name!r} has more bytes than its shape needs")

    @property
    def _stored(self) -> np.dtype[Any]:
        return self.dtype.newbyteorder(">") if self.swapped else self.dtype

    def _stream(self, file: IO[bytes]) -> Iterator[bytes | memoryview]:
        left = self.nbytes
        while left > 0:
            block = file.read(min(BLOCK, left))
            if not block or len(block) % self.dtype.itemsize:
                raise BadContainer(f"tensor {self.name!r} is cut off")
            left -= len(block)
            yield (
                np.frombuffer(block, self._stored).astype(self.dtype).tobytes()
                if (self.swapped)
                else block
            )


def _header(file: IO[bytes], name: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, Fortran order and dtype. A header is a Python literal, read as one and never evaluated."""
    magic = file.read(8)
    width = {b"\x93NUMPY\x01\x00": 2, b"\x93NUMPY\x02\x00": 4}.get(magic)
    if width is None:
        raise BadContainer(f"{name!r} is no .npy array of version 1 or 2")
    length = int.from_bytes(file.read(width), "little")
    if length > MAX_NPY_HEADER:
        raise BadContainer(f"{name!r} has a header of {length:,} bytes")
    found = ast.literal_eval(file.read(length).decode("latin-1").strip())
    if not isinstance(found, dict) or found.keys() != {"descr", "fortran_order", "shape"}:
        raise BadContainer(f"the header of {name!r} is not that of an array")
    kind = re.fullmatch(r"[<>|=]?[a-z?]\d{0,2}", str(found["descr"]))
    if kind is None or not isinstance(found["fortran_order"], bool):
        raise BadContainer(f"tensor {name!r} has the dtype {str(found['descr'])[:64]!r}: not taken")
    return found["shape"], found["fortran_order"], np.dtype(found["descr"])


def extract(source: Path, target: Path, limits: Limits) -> None:
    """Write the archive's arrays to `target` in canonical form; `layer.npy` becomes `layer`."""
    with _archive(source) as archive:
        infos = archive.infolist()
        if len(infos) > limits.tensors:
            raise BadContainer(f"{len(infos):,} arrays are too many", code="TOO_MANY_TENSORS")
        if len({info.filename for info in infos}) != len(infos):
            raise BadContainer("a name occurs twice in the archive")
        if sum(info.file_size for info in infos) > limits.file_bytes:
            raise TooLarge(f"the arrays unpack to more than {limits.file_bytes:,} bytes")
        entries = [_Entry(archive, info, limits) for info in infos]
        with CanonicalWriter(target, [entry.layout for entry in entries]) as writer:
            for entry in entries:
                writer.write(entry.name, entry.blocks())


def write(canonical: Path, out: Path) -> None:
    """The same weights as an archive that `np.load` reads; same weights, same bytes."""
    manifest = read_manifest(canonical)
    for tensor in manifest.tensors:
        if tensor.dtype not in NUMPY:
            raise Unusable(
                f"numpy has no dtype for tensor {tensor.name!r} ({tensor.dtype}); ask for safetensors",
                code="NOT_REPRESENTABLE",
            )
    with canonical.open("rb") as file, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for tensor in manifest.tensors:
            entry = zipfile.ZipInfo(f"{tensor.name}.npy", (1980, 1, 1, 0, 0, 0))
            with archive.open(entry, "w", force_zip64=True) as part:
                header = {
                    "descr": npy.dtype_to_descr(NUMPY[tensor.dtype]),
                    "fortran_order": False,
                    "shape": tensor.shape,
                }
                npy.write_array_header_1_0(part, header)
                for block in copy_range(file, tensor.offset, tensor.nbytes):
                    part.write(block)
