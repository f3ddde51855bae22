"""Sending weights: streamed, with ETag, and a range where one is asked for."""

import re
from pathlib import Path
from typing import IO, Any

from django.http import FileResponse, HttpResponse, HttpResponseBase
from rest_framework.request import Request

from fl_server_core.exceptions import Invalid

RANGE = re.compile(r"bytes=(\d*)-(\d*)")
BLOCK = 2**20


class _Part:
    """A stretch of an open file, as a file."""

    def __init__(self, file: IO[bytes], start: int, length: int) -> None:
        file.seek(start)
        self._file, self._left = file, length

    def read(self, size: int = -1) -> bytes:
        if self._left <= 0:
            self.close()
            return b""
        data = self._file.read(self._left if size < 0 else min(size, self._left))
        self._left -= len(data)
        return data

    def close(self) -> None:
        self._file.close()


def wants_safetensors(request: Request) -> bool:
    """Whether safetensors is asked for, by query or by header; `Invalid` for another format."""
    wanted = request.query_params.get("format")
    if wanted not in (None, "safetensors"):
        raise Invalid(
            "format is safetensors; leave it out for the container that was uploaded",
            code="BAD_FORMAT",
        )
    return bool(wanted) or "application/vnd.safetensors" in request.headers.get("Accept", "")


def send(request: Request, path: Path, *, etag: str, size: int, filename: str) -> HttpResponseBase:
    """The file, a part of it (206), nothing new (304), or no such part (416). It may be unlinked meanwhile."""
    quoted = f'"{etag}"'
    headers = {"ETag": quoted, "Accept-Ranges": "bytes", "Cache-Control": "private, no-cache"}
    known = request.headers.get("If-None-Match", "").split(",")
    if {quoted, "*"} & {tag.strip().removeprefix("W/") for tag in known}:
        return HttpResponse(status=304, headers=headers)
    wanted = _range(request, quoted, size)
    if wanted == (0, 0) and size:
        return HttpResponse(status=416, headers={**headers, "Content-Range": f"bytes */{size}"})
    start, end = wanted or (0, size)
    file: Any = path.open("rb")
    response = FileResponse(
        _Part(file, start, end - start),
        status=206 if wanted else 200,
        as_attachment=True,
        filename=filename,
        content_type="application/octet-stream",
    )
    response.block_size = BLOCK
    headers["Content-Length"] = str(end - start)
    if wanted:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    for name, value in headers.items():
        response[name] = value
    return response


def _range(request: Request, etag: str, size: int) -> tuple[int, int] | None:
    """Start and end of one range; None for the whole, (0, 0) for one that lies outside."""
    found = RANGE.fullmatch(request.headers.get("Range", "").strip())
    only_if = request.headers.get("If-Range")
    if found is None or found.groups() == ("", "") or (only_if and only_if != etag):
        return None
    first, last = (text[:20] for text in found.groups())
    if not first:
        start, end = max(0, size - int(last)), size
    else:
        start, end = int(first), min(size, int(last) + 1) if last else size
    return (start, end) if start < end else (0, 0)
