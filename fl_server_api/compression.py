"""Request bodies with `Content-Encoding: gzip`: unpacked while they are read, and never beyond a limit."""

import zlib
from typing import Any

from django.conf import settings
from rest_framework.request import Request

from fl_server_api.uploads import FORM_OVERHEAD
from fl_server_core.exceptions import Invalid, TooLarge, UnknownContainer

BLOCK = 2**16
RATIO = 100  # unpacked to packed, once more than FREE bytes have come out
FREE = 64 * 2**20


class Gunzipped:
    """Reads like the stream that it wraps, unpacked. After an error it gives the packed bytes, for draining."""

    def __init__(self, raw: Any, limit: int) -> None:
        self._raw = raw
        self._limit = limit
        self._zip = zlib.decompressobj(wbits=31)
        self._ready = b""
        self._came = self._made = 0
        self._failed = False

    def read(self, size: int | None = None) -> bytes:
        """Exactly `size` bytes, fewer at the end. All of it only if that fits into memory."""
        if self._failed:
            return bytes(self._raw.read(BLOCK if size is None else size))
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
        while True:
            packed = self._ready or self._raw.read(BLOCK)
            self._came += 0 if self._ready else len(packed)
            if not packed or self._zip.eof:
                if packed:
                    raise Invalid("something follows the gzip stream", code="BAD_CONTENT_ENCODING")
                if not self._zip.eof:
                    raise Invalid("the gzip stream is cut off", code="BAD_CONTENT_ENCODING")
                return b""
            try:
                made = self._zip.decompress(packed, most)
            except zlib.error as error:
                raise Invalid(
                    f"the body is no gzip stream: {error}", code="BAD_CONTENT_ENCODING"
                ) from error
            self._ready = self._zip.unconsumed_tail or self._zip.unused_data
            self._made += len(made)
            if self._made > self._limit or self._made > max(FREE, RATIO * self._came):
                raise TooLarge(
                    f"the body unpacks to more than {RATIO} times its {self._came:,} bytes, or to "
                    f"more than {self._limit:,}",
                    code="COMPRESSION_RATIO",
                )
            if made:
                return made

    def close(self) -> None:
        """Only the server may close its stream."""


def unpack(request: Request) -> None:
    """Make a packed multipart body readable as if it were not; `UnknownContainer` for other codings."""
    coding = request.headers.get("Content-Encoding", "identity").strip().lower()
    if coding in ("", "identity"):
        return
    multipart = (request.content_type or "").startswith("multipart/form-data")
    if coding != "gzip" or not multipart:
        raise UnknownContainer(
            "only multipart bodies may be packed, and only with gzip; send this one as it is",
            code="UNKNOWN_CONTENT_ENCODING",
        )
    django: Any = request._request
    if not isinstance(django._stream, Gunzipped):
        django._stream = Gunzipped(django._stream, settings.FL_MAX_MODEL_BYTES + FORM_OVERHEAD)
