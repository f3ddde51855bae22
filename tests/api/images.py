"""Image files, honest and hostile, as the tests of inference send them."""

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def encoded(array: Any, format: str = "PNG", **options: Any) -> bytes:
    """Of (height, width) or (height, width, 3) bytes."""
    file = io.BytesIO()
    Image.fromarray(np.asarray(array)).save(file, format, **options)
    return file.getvalue()


def pixels(height: int, width: int, channels: int = 3, seed: int = 1) -> np.ndarray[Any, Any]:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def smooth(height: int, width: int) -> np.ndarray[Any, Any]:
    """What JPEG keeps well."""
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([rows * 3, columns * 2, rows + columns], -1).astype(np.uint8)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *before: bytes, rows: bytes = b"") -> bytes:
    """A PNG whose header claims grey of that size, whatever its rows hold."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = zlib.compress(rows, 9)
    return b"".join(
        [SIGNATURE, chunk(b"IHDR", header), *before, chunk(b"IDAT", data), chunk(b"IEND", b"")]
    )


def bomb(width: int = 40_000, height: int = 40_000) -> bytes:
    """1.6 gigapixels in some kilobytes."""
    return png(width, height, rows=bytes(2**22))


def jpeg_bomb() -> bytes:
    """A small JPEG whose header was given the largest size there is."""
    data = bytearray(encoded(pixels(8, 8), "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", 65_500, 65_500)
    return bytes(data)


def text_bomb() -> bytes:
    """Compressed comments that unpack to 256 MiB each, before an honest picture."""
    packed = zlib.compress(bytes(2**28), 9)
    comment = chunk(b"zTXt", b"Comment\0\0" + packed)
    return png(4, 4, *[comment] * 4, rows=bytes(20))


def profile_bomb() -> bytes:
    """The same in a colour profile."""
    packed = zlib.compress(bytes(2**28), 9)
    return png(4, 4, chunk(b"iCCP", b"p\0\0" + packed), rows=bytes(20))
