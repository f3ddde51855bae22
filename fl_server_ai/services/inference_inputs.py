"""From what a caller sends as `model_input` to one tensor, or an image's bytes; nothing of it is executed or decoded."""

import base64
import binascii
import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from django.conf import settings

from fl_server_ai.containers import Limits, read_manifest, sniff
from fl_server_ai.containers.canonical import parse
from fl_server_ai.sandbox.preparation import misfit
from fl_server_ai.sandbox.tensors import CARRIED, RawTensor
from fl_server_ai.services.intake import canonical_blob
from fl_server_core.exceptions import Invalid, TooLarge, UnknownContainer
from fl_server_core.storage import staging_path

DTYPES = {
    "float64": np.float64, "float32": np.float32, "float16": np.float16, "int64": np.int64,
    "int32": np.int32, "int16": np.int16, "int8": np.int8, "uint8": np.uint8, "bool": np.bool_,
}  # fmt: skip
INPUT, CALIBRATION = "input", "calibration"
IMAGE = "image"  # a tensor of this name is the bytes of an image file
HEAD = 64
IMAGES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")
OTHER_IMAGES = {
    b"GIF8": "GIF", b"II*\0": "TIFF", b"MM\0*": "TIFF", b"II+\0": "TIFF", b"MM\0+": "TIFF", b"BM": "BMP",
    b"RIFF": "WebP", b"<svg": "SVG", b"<?xml": "SVG", b"\0\0\1\0": "ICO", b"8BPS": "PSD",
    b"\0\0\0\x0cjP  ": "JPEG 2000", b"\xff\x0a": "JPEG XL", b"%PDF": "PDF", b"DICM": "DICOM",
}  # fmt: skip


def input_from_json(value: Any, dtype: str | None) -> RawTensor:
    """Nested lists of numbers, or the base64 text of a file of tensors or an image.

    `dtype` is for lists: float32 unless it is given (JSON writes 1.0 as 1), bool for true and false. A number
    that the dtype can't hold is refused, never rounded away or made infinite.
    """
    if not isinstance(value, str):
        return _from_lists(value, dtype)
    try:
        data = base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError) as error:
        raise _bad(
            "a text must be the base64 form of a PNG, JPEG, safetensors, .npz or torch.save file"
        ) from error
    path = staging_path(".upload")
    try:
        path.write_bytes(data)
        return input_from_file(path, dtype)
    finally:
        path.unlink(missing_ok=True)


def input_from_file(path: Path, dtype: str | None = None) -> RawTensor:
    """The only tensor in a safetensors, .npz or torch.save file, with its dtype; or a PNG or JPEG file's bytes.

    An image is decoded only in the sandbox. The file is gone after.
    """
    if dtype is not None:
        raise Invalid(
            "dtype is for nested lists; a file has its own",
            errors=[{"pointer": "/dtype", "code": "contradiction", "detail": "leave it out"}],
        )
    check_size(path.stat().st_size)
    if _is_image(path):
        data = path.read_bytes()
        path.unlink()
        return RawTensor("U8", (len(data),), data, IMAGE)
    if sniff(path) == "safetensors":
        return _only_tensor(path)
    with canonical_blob(path, sha256=None) as (manifest, _, publish):
        found = read_manifest(publish.path).tensors
        if len(manifest.tensors) != 1:
            raise _bad(f"one tensor is wanted, the file holds {len(manifest.tensors)}")
        (info,) = found
        check_size(info.nbytes)
        if info.dtype not in CARRIED:
            raise _bad(f"dtype {info.dtype} can't be given to a model here")
        with publish.path.open("rb") as file:
            file.seek(info.offset)
            return RawTensor(info.dtype, info.shape, file.read(info.nbytes), INPUT)


@contextmanager
def named_calibration() -> Iterator[None]:
    """Refusals within are about `calibration_input`, which is read as `model_input` is."""
    try:
        yield
    except Invalid as refusal:
        refusal.detail = f"calibration_input: {refusal.detail}"
        for error in refusal.data.get("errors", []):
            error["pointer"] = error["pointer"].replace("/model_input", "/calibration_input")
        raise


def _only_tensor(path: Path) -> RawTensor:
    """Of a safetensors file: read where it lies, since a question needs no durable copy."""
    data = path.read_bytes()
    tensors = parse(io.BytesIO(data), len(data), Limits()).tensors
    path.unlink()
    if len(tensors) != 1:
        raise _bad(f"one tensor is wanted, the file holds {len(tensors)}")
    (info,) = tensors
    if info.dtype not in CARRIED:
        raise _bad(f"dtype {info.dtype} can't be given to a model here")
    end = info.offset + info.nbytes
    return RawTensor(info.dtype, info.shape, memoryview(data)[info.offset : end], INPUT)


def check_size(size: int) -> None:
    """Raise `TooLarge` for more bytes than an input may have."""
    if size > settings.FL_MAX_INPUT_BYTES:
        raise TooLarge(f"{size:,} bytes; an input may have {settings.FL_MAX_INPUT_BYTES:,}")


def check_input(tensor: RawTensor, expected: Sequence[int | None] | None) -> None:
    """Raise `Invalid` (INPUT_SHAPE), naming the dimension, unless it fits the model's `input_shape`."""
    wrong = misfit(tensor.shape, expected)
    if wrong:
        raise _bad(f"the input has shape {wrong}", code="INPUT_SHAPE")


def _is_image(path: Path) -> bool:
    """By its first bytes. `UnknownContainer` (IMAGE_FORMAT) for an image that is not decoded here."""
    with path.open("rb") as file:
        head = file.read(HEAD)
    if head.startswith(IMAGES):
        return True
    for magic, name in OTHER_IMAGES.items():
        # A safetensors file may begin with any of them; its header follows.
        if head.startswith(magic) and head[8:9] != b"{":
            raise UnknownContainer(
                f"{name} files are not read; send PNG or JPEG", code="IMAGE_FORMAT"
            )
    if head[4:8] == b"ftyp":
        raise UnknownContainer(
            "HEIC and AVIF files are not read; send PNG or JPEG", code="IMAGE_FORMAT"
        )
    return False


def _from_lists(value: Any, dtype: str | None) -> RawTensor:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            array = np.asarray(value)
    except (ValueError, OverflowError, RecursionError, DeprecationWarning) as error:
        raise _bad("nested lists must have the same length at each depth") from error
    if array.dtype.kind == "O" and all(type(one) in {int, float} for one in array.flat):
        raise _bad(
            "an integer is out of range; send -2^63 to 2^64-1, or a number with a decimal point"
        )
    if array.dtype.kind not in "biuf":
        raise _bad("nested lists hold numbers only, or true and false only")
    wanted = np.dtype(DTYPES[dtype] if dtype else "bool" if array.dtype.kind == "b" else "float32")
    with np.errstate(all="ignore"):
        cast = array.astype(wanted)
        exact = wanted.kind == "f" or np.array_equal(cast.astype(array.dtype), array)
    if not exact or (wanted.kind == "f" and not np.isfinite(cast).all()):
        raise _bad(f"a number can't be held by {wanted.name}")
    check_size(cast.nbytes)
    return RawTensor.of(cast, INPUT)


def _bad(detail: str, code: str = "BAD_INPUT") -> Invalid:
    return Invalid(
        detail,
        code=code,
        errors=[{"pointer": "/model_input", "code": "invalid", "detail": detail[:300]}],
    )
