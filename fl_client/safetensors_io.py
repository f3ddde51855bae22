"""Weights as safetensors files: written and read a tensor at a time, without torch.

Names map to arrays; a dtype that NumPy lacks (bfloat16, the float8 family) stays bit for bit what
it is, as a torch tensor, and needs torch. Format: https://github.com/huggingface/safetensors.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from fl_client.arrays import BFloat16, dtype_name, is_torch
from fl_client.errors import BrokenFile

NUMPY_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
TORCH_DTYPES = {"BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
TORCH_SIZES = {"BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
_CODES = {name: code for code, name in (NUMPY_DTYPES | TORCH_DTYPES).items()}
_MAX_HEADER = 100_000_000


def save(
    path: str | Path, weights: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> str:
    """Write arrays or torch tensors; return the file's SHA-256 (hex).

    The file appears under `path` only when it is complete and on disk. Equal weights give equal
    bytes. TypeError for a value that is no array or whose dtype has no place in the format.
    """
    path = Path(path)
    codes = {name: _code(name, value) for name, value in weights.items()}
    order = sorted(codes, key=lambda name: (-_size(codes[name]), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in order:
        shape = [int(n) for n in weights[name].shape]
        end = offset + _count(shape) * _size(codes[name])
        header[name] = {"dtype": codes[name], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    partial = path.with_name(path.name + ".tmp")
    with partial.open("wb") as file:
        for piece in (len(text).to_bytes(8, "little"), text):
            digest.update(piece)
            file.write(piece)
        for name in order:
            data = _bytes(weights[name])
            digest.update(data)
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    return digest.hexdigest()


def load(path: str | Path) -> dict[str, Any]:
    """Read a whole file; the arrays are writable and own their memory.

    BrokenFile if the header does not describe exactly the bytes that follow; ImportError if a
    tensor needs torch and torch is not installed.
    """
    with Path(path).open("rb") as file:
        return dict(_tensors(file, os.fstat(file.fileno()).st_size))


def _tensors(file: BinaryIO, size: int) -> Iterator[tuple[str, Any]]:
    import numpy as np

    header, start = _header(file, size)
    expected = 0
    for name, entry in sorted(header.items(), key=lambda item: _begin(*item)):
        try:
            code, shape = str(entry["dtype"]), [int(n) for n in entry["shape"]]
            begin, end = entry["data_offsets"]
        except (KeyError, TypeError, ValueError):
            raise _broken(f"the entry of {name!r} is malformed") from None
        if code not in NUMPY_DTYPES and code not in TORCH_DTYPES:
            raise _broken(f"{name!r} has the unknown dtype {code!r}")
        if begin != expected or min(shape, default=1) < 0:
            raise _broken(f"{name!r} does not begin where the tensor before it ends")
        if end - begin != _count(shape) * _size(code) or start + end > size:
            raise _broken(f"{name!r} has other than the bytes that its shape needs")
        expected = end
        file.seek(start + begin)
        raw = np.empty(end - begin, np.uint8)
        if file.readinto(raw.data) != raw.size:  # type: ignore[attr-defined]
            raise _broken(f"the file ends within {name!r}")
        if code in NUMPY_DTYPES:
            dtype = np.dtype(NUMPY_DTYPES[code]).newbyteorder("<")
            yield name, raw.view(dtype).astype(dtype.newbyteorder("="), copy=False).reshape(shape)
        else:
            yield name, _torch_tensor(raw, TORCH_DTYPES[code], shape, name)
    if start + expected != size:
        raise _broken("bytes follow the last tensor")


def _header(file: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, _MAX_HEADER):
        raise _broken("the header is longer than the file")
    try:
        header = json.loads(file.read(length))
    except (ValueError, RecursionError):
        raise _broken("the header is not JSON") from None
    if not isinstance(header, dict):
        raise _broken("the header is not an object")
    header.pop("__metadata__", None)
    return header, 8 + length


def _begin(name: str, entry: Any) -> tuple[int, int]:
    try:
        begin, end = entry["data_offsets"]
        return int(begin), int(end)
    except (KeyError, TypeError, ValueError):
        raise _broken(f"the entry of {name!r} is malformed") from None


def _broken(detail: str) -> BrokenFile:
    return BrokenFile(0, "BROKEN_FILE", f"not a safetensors file: {detail}")


def _count(shape: list[int]) -> int:
    count = 1
    for n in shape:
        count *= n
    return count


def _size(code: str) -> int:
    import numpy as np

    return TORCH_SIZES.get(code) or np.dtype(NUMPY_DTYPES[code]).itemsize


def _code(name: str, value: Any) -> str:
    if not hasattr(value, "dtype") or not hasattr(value, "shape"):
        raise TypeError(f"{name!r} is a {type(value).__name__}, not an array")
    dtype = dtype_name(value)
    if dtype not in _CODES:
        raise TypeError(f"{name!r} has dtype {dtype}, which safetensors cannot hold")
    return _CODES[dtype]


def _bytes(value: Any) -> memoryview:
    import numpy as np

    if is_torch(value):
        from fl_client.torch_support import raw_bytes

        return raw_bytes(value).data
    array = np.asarray(value.bits if isinstance(value, BFloat16) else value, order="C")
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return little.reshape(-1).view(np.uint8).data


def _torch_tensor(raw: Any, dtype: str, shape: list[int], name: str) -> Any:
    try:
        from fl_client.torch_support import from_raw_bytes

        return from_raw_bytes(raw, dtype, shape)
    except ImportError:
        raise ImportError(
            f"{name!r} is {dtype}, which NumPy cannot hold; install fl-client[torch]"
        ) from None
