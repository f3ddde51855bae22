"""Uploaded files go straight to staging, hashed and counted on the way; memory stays flat."""

import contextlib
import hashlib
from pathlib import Path
from typing import Any

from django.conf import settings
from django.core.exceptions import RequestDataTooBig
from django.core.files.uploadedfile import UploadedFile
from django.core.files.uploadhandler import FileUploadHandler
from django.http import HttpRequest
from rest_framework.request import Request

from fl_server_core.connections import connection_release
from fl_server_core.exceptions import Invalid, TooLarge
from fl_server_core.storage import needs_room, staging_path, write_all

CHUNK = 2**20
QUICK = 2**16  # bytes of a body that is here already, or as good as
STAGED = "fl.staged"  # in a request's META
FORM_OVERHEAD = 2**20  # what field names and boundaries may add


class StagedFile(UploadedFile):  # type: ignore[type-arg]
    """A file part in staging. It is deleted when the request ends, unless a service has taken it."""

    def __init__(self, name: str, content_type: str | None, most: int) -> None:
        self._most = most
        self.staged_path: Path = staging_path(".upload")
        self._out = self.staged_path.open("xb", buffering=0)
        super().__init__(self._out, name, content_type, 0)
        self._hash = hashlib.sha256()

    @property
    def sha256(self) -> str:
        """Digest (hexadecimal) of all bytes so far."""
        return self._hash.hexdigest()

    def add(self, data: bytes) -> None:
        """Append a block; a full disk is `OutOfSpace`, a file over the limit `TooLarge`."""
        self.size = (self.size or 0) + len(data)
        if self.size > self._most:
            raise TooLarge(f"a file may have {self._most:,} bytes")
        self._hash.update(data)
        with needs_room():
            write_all(self._out, data)

    def finish(self) -> None:
        """Nothing more will be added."""
        with needs_room():  # a network's disk may say so as late as that
            self._out.close()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what could not be written is deleted anyway
            self._out.close()
        self.staged_path.unlink(missing_ok=True)


class StagingUploadHandler(FileUploadHandler):
    """Django's hook for the parts of a multipart body."""

    chunk_size = CHUNK

    def __init__(self, request: Any = None) -> None:
        super().__init__(request)
        self.staged: StagedFile | None = None
        self.most = settings.FL_MAX_MODEL_BYTES

    def handle_raw_input(
        self,
        input_data: Any,
        META: dict[str, str],  # noqa: N803 - Django's name
        content_length: int,
        boundary: str,
        encoding: str | None = None,
    ) -> None:
        user = getattr(self.request, "user", None)
        if user is not None and not user.is_authenticated:
            self.most = settings.DATA_UPLOAD_MAX_MEMORY_SIZE
            if content_length > self.most:
                raise RequestDataTooBig("strangers send no files")
        if content_length > self.most + FORM_OVERHEAD:  # pages have no `refuse_large`
            raise RequestDataTooBig(f"a body may have {self.most:,} bytes")
        if content_length > QUICK:
            connection_release()  # the body may take hours

    def new_file(self, *args: Any, **kwargs: Any) -> None:
        super().new_file(*args, **kwargs)
        self.staged = StagedFile(self.file_name or "file", self.content_type, self.most)
        if self.request is not None:
            self.request.META.setdefault(STAGED, []).append(self.staged)

    def receive_data_chunk(self, raw_data: bytes, start: int) -> None:
        if self.staged is not None:
            try:
                self.staged.add(raw_data)
            except BaseException:
                self.staged.close()
                raise

    def file_complete(self, file_size: int) -> StagedFile | None:
        if self.staged is not None:
            self.staged.finish()
        done, self.staged = self.staged, None
        return done

    def upload_complete(self) -> None:
        """Django says nothing of a body without its last boundary, and forgets the file that it ends in."""
        if self.staged is not None:
            self.staged.close()
            raise Invalid(
                f"the body ends within the file {str(self.field_name)[:64]!r}; send it again",
                code="BODY_INTERRUPTED",
            )

    def upload_interrupted(self) -> None:
        if self.staged is not None:
            self.staged.close()


def discard_staged(request: HttpRequest) -> None:
    """Delete what the request has staged and no service has taken over.

    Django closes only files that arrived whole: where reading the body raises, it tells no handler.
    """
    for staged in request.META.pop(STAGED, []):
        staged.close()


def announced(request: Request) -> int:
    """Bytes of the body, as the request says; 0 if it does not."""
    try:
        return int(request.META.get("CONTENT_LENGTH") or 0)
    except ValueError:
        return 0


def refuse_large(request: Request, limit: int | None = None) -> None:
    """Raise `TooLarge` for a body that says so itself, before any of it is read. Strangers send no files."""
    if limit is None and request.user.is_authenticated:
        limit = settings.FL_MAX_MODEL_BYTES
    limit = settings.DATA_UPLOAD_MAX_MEMORY_SIZE - FORM_OVERHEAD if limit is None else limit
    length = announced(request)
    if length > limit + FORM_OVERHEAD:
        raise TooLarge(f"{length:,} bytes announced; a file may have {limit:,}")
