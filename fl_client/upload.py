"""Files to the server: small ones in one request, large ones taken up where they broke off."""

import base64
import contextlib
import json
import logging
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fl_client.digest import sha256_of
from fl_client.errors import Conflict, ConnectionFailed, FLError, NotFound
from fl_client.transport import Form, Transport

log = logging.getLogger("fl.client")
LARGE = 16 * 2**20  # bytes; below, one request is as good
BLOCK = 2**18
TUS = {"Tus-Resumable": "1.0.0"}
_AGAIN = frozenset({"UPLOAD_GONE", "UPLOAD_INCOMPLETE", "NOT_FOUND"})


def send_file(
    transport: Transport,
    url: str,
    form: Form,
    path: Path,
    *,
    key: str | None = None,
    read_timeout: float = 300.0,
    beside: Mapping[str, Path] | None = None,
) -> Any:
    """POST `form` with the file as `model_file`, or with its `upload` once that is complete.

    `beside`: small files that go with the form in both cases.

    Where a large transfer stands is noted in `<path>.upload`, so that a later call, also of another
    process, goes on. Raises what `Transport.json` raises.
    """
    repeatable = None if key else True
    if path.stat().st_size < LARGE:
        return transport.json(
            "POST", url, form=form, files={"model_file": path, **(beside or {})}, key=key, repeatable=repeatable,
            read_timeout=read_timeout,
        )  # fmt: skip
    sender = _Sender(transport, path)
    for last in (False, True):
        fields = [*form, ("upload", sender.push())]
        try:
            answer = transport.json(
                "POST", url, form=fields, files=dict(beside or {}), key=key, repeatable=repeatable,
                read_timeout=read_timeout,
            )  # fmt: skip
        except FLError as error:
            if last or error.code not in _AGAIN:
                raise
            log.info("the upload goes on, or begins anew: %s", error.detail)
        else:
            sender.forget()
            return answer
    raise AssertionError("unreachable: the second time returns or raises")


class _Sender:
    """One file on its way, by the tus protocol (1.0.0)."""

    def __init__(self, transport: Transport, path: Path) -> None:
        self._transport = transport
        self._path = path
        self._note = path.with_name(path.name + ".upload")
        self._size = path.stat().st_size
        self._reached = 0
        self._begun = uuid.uuid4().hex  # an announcement is sent again as the same

    def push(self) -> str:
        """Send what is missing and return the upload's id.

        As long as some bytes arrive between two failures, it goes on (`Transport.patiently`).
        """
        found: str = self._transport.patiently(self._attempt, progress=lambda: self._reached)
        return found

    def _attempt(self) -> str:
        try:
            return self._once()
        except FLError as error:
            if not self._goes_on(error):
                raise
            raise ConnectionFailed(0, "INTERRUPTED", error.detail) from error

    def forget(self) -> None:
        self._note.unlink(missing_ok=True)
        self._begun = uuid.uuid4().hex

    def _goes_on(self, error: FLError) -> bool:
        """Whether a refusal only means that this attempt is over; forgets an upload that is gone."""
        if isinstance(error, NotFound) or error.code in {"DIGEST_MISMATCH", "TOO_LARGE"}:
            known = self._note.exists() or error.code == "UPLOAD_GONE"
            self.forget()  # the next attempt begins with the first byte
            return known
        if isinstance(error, Conflict):
            return error.code in {"OFFSET_MISMATCH", "UPLOAD_TAKEN_OVER"}
        return error.code == "BODY_INTERRUPTED"

    def _once(self) -> str:
        url = self._url() or self._create()
        offset = int(self._ask("HEAD", url)["Upload-Offset"])
        self._reached = max(self._reached, offset)
        if offset < self._size:
            headers = {
                "Upload-Offset": str(offset),
                "Content-Type": "application/offset+octet-stream",
                "Content-Length": str(self._size - offset),
            }
            with self._path.open("rb") as file:
                file.seek(offset)
                self._ask("PATCH", url, headers, iter(lambda: file.read(BLOCK), b""))
        return url.rstrip("/").rpartition("/")[2]

    def _create(self) -> str:
        digest = sha256_of(self._path)
        told = base64.b64encode(digest.encode()).decode()
        headers = {
            "Upload-Length": str(self._size),
            "Upload-Metadata": f"sha256 {told}",
            "Idempotency-Key": f"{self._begun}-{digest}",
        }
        url = str(self._ask("POST", "uploads/", headers)["Location"])
        partial = self._note.with_name(self._note.name + ".tmp")
        partial.write_text(json.dumps({"url": url, "size": self._size, "sha256": digest}))
        partial.replace(self._note)
        return url

    def _url(self) -> str | None:
        """The upload of these bytes that was begun before, if there is one."""
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
            noted = json.loads(self._note.read_text())
            if noted["size"] == self._size and noted["sha256"] == sha256_of(self._path):
                return str(noted["url"])
        return None

    def _ask(
        self,
        method: str,
        url: str,
        headers: dict[str, str] | None = None,
        content: Iterator[bytes] | None = None,
    ) -> Any:
        return self._transport.headers(
            method, url, headers={**TUS, **(headers or {})}, content=content
        )
