"""Request bodies with a `Content-Encoding`: unpacked while they are read, and never beyond a limit.

gzip always; zstd where it can be had (the standard library's from Python 3.14 on, else `backports.zstd`, the extra
`zstd`). What can be read is said with every answer, in the header `Accept-Encoding` (RFC 7694). Answers are never
packed: weights hardly shrink, and `Range`, `ETag` and digests are of the bytes that travel.
"""

import importlib
import importlib.util
import sys
import zlib
from collections.abc import Callable
from typing import Any, Protocol

from django.conf import settings
from rest_framework.request import Request

from fl_server_api.uploads import FORM_OVERHEAD
from fl_server_core.exceptions import Invalid, TooLarge, UnknownContainer

BLOCK = 2**16
RATIO = 100  # unpacked to packed, once more than FREE bytes have come out
FREE = 64 * 2**20
WINDOW_LOG = 23  # RFC 9659: nobody need keep more than 8 MiB for zstd


class Unpacker(Protocol):
    """One stream of one coding; `ValueError` for what is none."""

    @property
    def eof(self) -> bool: ...
    @property
    def hungry(self) -> bool: ...  # nothing more comes out without more going in
    @property
    def rest(self) -> bytes: ...  # what was given beyond the stream's end
    def some(self, packed: bytes, most: int) -> bytes: ...  # `packed` is empty unless it is hungry


class Gzip:
    """One member, as browsers and tools make it."""

    def __init__(self) -> None:
        self._zip = zlib.decompressobj(wbits=31)

    @property
    def eof(self) -> bool:
        return self._zip.eof

    @property
    def hungry(self) -> bool:
        return not self._zip.unconsumed_tail

    @property
    def rest(self) -> bytes:
        return self._zip.unused_data

    def some(self, packed: bytes, most: int) -> bytes:
        try:
            return self._zip.decompress(self._zip.unconsumed_tail + packed, most)
        except zlib.error as error:
            raise ValueError(str(error)) from error


class Zstd:
    """One frame without a dictionary."""

    def __init__(self) -> None:
        self._zstd = importlib.import_module(zstd_module())
        limit = {self._zstd.DecompressionParameter.window_log_max: WINDOW_LOG}
        self._stream = self._zstd.ZstdDecompressor(options=limit)

    @property
    def eof(self) -> bool:
        return bool(self._stream.eof)

    @property
    def hungry(self) -> bool:
        return bool(self._stream.needs_input)

    @property
    def rest(self) -> bytes:
        return bytes(self._stream.unused_data)

    def some(self, packed: bytes, most: int) -> bytes:
        try:
            return bytes(self._stream.decompress(packed, most))
        except self._zstd.ZstdError as error:
            raise ValueError(str(error)) from error


def zstd_module() -> str:
    """Where zstd is to be imported from; empty where it is not installed."""
    if sys.version_info >= (3, 14):
        return "compression.zstd"
    known = importlib.util.find_spec("backports") and importlib.util.find_spec("backports.zstd")
    return "backports.zstd" if known else ""


CODINGS: dict[str, Callable[[], Unpacker]] = {
    "gzip": Gzip,
    **({"zstd": Zstd} if zstd_module() else {}),
}
ACCEPTED = ", ".join(CODINGS)


class Unpacked:
    """Reads like the stream that it wraps, unpacked. After an error it gives the packed bytes, for draining."""

    def __init__(self, raw: Any, limit: int, coding: str) -> None:
        self.raw = raw
        self._limit = limit
        self._coding = coding
        self._stream = CODINGS[coding]()
        self._came = self._made = 0
        self._failed = False

    def read(self, size: int | None = None) -> bytes:
        """Exactly `size` bytes, fewer at the end. All of it only if that fits into memory."""
        if self._failed:
            return bytes(self.raw.read(BLOCK if size is None else size))
        most = settings.DATA_UPLOAD_MAX_MEMORY_SIZE
        wanted = most + 1 if size is None or size < 0 else size
        parts, left = [], wanted
        try:
            while left > 0 and (part := self._some(left)):
                parts.append(part)
                left -= len(part)
        except BaseException:
            self._failed = True
            raise
        if not left and wanted != size:
            self._failed = True
            raise TooLarge(f"a form without files may have {most:,} bytes")
        return b"".join(parts)

    def readline(self, *_: object) -> bytes:
        """Some bytes: Django iterates over what is left of a body only to throw it away."""
        return self.read(BLOCK)

    def _some(self, most: int) -> bytes:
        """At least one byte, at most so many; none at the end."""
        while not self._stream.eof:
            packed = self.raw.read(BLOCK) if self._stream.hungry else b""
            ended = self._stream.hungry and not packed
            self._came += len(packed)
            try:
                made = self._stream.some(packed, most)
            except ValueError as error:
                raise Invalid(
                    f"the body is no {self._coding} stream: {error}", code="BAD_CONTENT_ENCODING"
                ) from error
            self._made += len(made)
            if self._made > self._limit or self._made > max(FREE, RATIO * self._came):
                raise TooLarge(
                    f"the body unpacks to more than {RATIO} times its {self._came:,} bytes, or to "
                    f"more than {self._limit:,}",
                    code="COMPRESSION_RATIO",
                )
            if made:
                return made
            if ended and not self._stream.eof:
                raise Invalid(f"the {self._coding} stream is cut off", code="BAD_CONTENT_ENCODING")
        if self._stream.rest or self.raw.read(1):
            raise Invalid(
                f"something follows the {self._coding} stream", code="BAD_CONTENT_ENCODING"
            )
        return b""

    def close(self) -> None:
        """Only the server may close its stream."""


def unpack(request: Request) -> None:
    """Make a packed multipart body readable as if it were not; `UnknownContainer` for other codings."""
    coding = request.headers.get("Content-Encoding", "identity").strip().lower()
    if coding in ("", "identity"):
        return
    multipart = (request.content_type or "").startswith("multipart/form-data")
    if coding not in CODINGS or not multipart:
        raise UnknownContainer(
            f"only multipart bodies may be packed, once, with {' or '.join(CODINGS)}; send this one as it "
            "is",
            code="UNKNOWN_CONTENT_ENCODING",
            accepted=list(CODINGS),
        )
    django: Any = request._request
    if not isinstance(django._stream, Unpacked):
        limit = settings.FL_MAX_MODEL_BYTES + FORM_OVERHEAD
        django._stream = Unpacked(django._stream, limit, coding)
