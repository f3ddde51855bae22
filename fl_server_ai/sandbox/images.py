"""Image files to tensors, in the child only: decoders of hostile bytes have nothing to reach there."""

import io
from typing import Any

import numpy as np
import torch
from PIL import Image, MpoImagePlugin, TiffImagePlugin  # noqa: F401 - JPEG files may want both, too late to import
from torch import Tensor

from fl_server_ai.sandbox.pipes import Refusal

FORMATS = ("PNG", "JPEG")
GREY = ("1", "L", "LA", "La")
DEEP = ("I", "I;16", "I;16B", "I;16L", "I;16N")  # 16 bits: of PNG, grey only
Image.MAX_IMAGE_PIXELS = None  # `decoded` has the limit, and refuses instead of warning


def decoded(data: bytes | bytearray, pixels: int) -> Tensor:
    """(1, channels, height, width): uint8, one channel for grey and three for all others; transparency is dropped.

    Grey PNG of 16 bits is float32 from 0 to 1, since it doesn't fit 8. EXIF orientation is not applied, as
    Pillow and torchvision don't. `Refusal` BAD_IMAGE, IMAGE_TOO_LARGE for more `pixels`, told before any is decoded.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(image, pixels)
            return _tensor(image)
    except (Refusal, MemoryError):
        raise
    except Exception as error:  # decoders raise whatever comes to them
        raise Refusal(
            "BAD_IMAGE",
            f"this is no PNG or JPEG that can be read: {error}; save it again and send it whole",
        ) from error


def warm_up() -> None:
    """Read one of each, so that everything is loaded while files can be opened."""
    for format in FORMATS:
        file = io.BytesIO()
        Image.new("RGB", (8, 8)).save(file, format, exif=Image.Exif())
        decoded(file.getvalue(), 64)


def _check_size(image: Any, pixels: int) -> None:
    width, height = image.size  # as the header says; not a pixel is decoded yet
    if width * height > pixels:
        raise Refusal(
            "IMAGE_TOO_LARGE",
            f"the image has {width:,} x {height:,} pixels; {pixels:,} are allowed: send it smaller",
        )


def _tensor(image: Any) -> Tensor:
    if image.mode in DEEP:
        deep = np.asarray(image).astype(np.float32) / np.float32(65535)
        return torch.from_numpy(deep)[None, None]
    if image.mode in GREY:
        return torch.from_numpy(np.array(image.convert("L")))[None, None]
    colours = torch.from_numpy(np.array(image.convert("RGB")))
    return colours.permute(2, 0, 1)[None].contiguous()
