"""Files from the server: streamed to disk, taken up where they broke off, compared with a digest."""

from pathlib import Path

import httpx

from fl_client.digest import sha256_of
from fl_client.errors import BrokenFile, ConnectionFailed, FLError
from fl_client.transport import Transport

SAFETENSORS = "application/vnd.safetensors"


def fetch(
    transport: Transport, url: str, target: Path, *, accept: str, sha256: str | None = None
) -> str:
    """Download to `target` and return the SHA-256 of what arrived, which the server vouched for.

    The digest is the answer's ETag; a foreign origin (an object store) is believed only if it
    delivers `sha256`. `target` appears complete or not at all; until then the bytes lie in
    `<target>.part`, where a later call, also of another process, goes on. BrokenFile if a
    download from the first byte to the last has another digest.
    """
    foreign = not transport.address.owns(transport.address.resolve(url))
    if foreign and not sha256:
        raise FLError(0, "FOREIGN_ORIGIN", f"no digest to check what {url} delivers")
    partial = _Partial(target)

    def once() -> str:
        resumed = partial.size > 0
        try:
            _transfer(transport, url, partial, accept)
            return partial.finish(sha256 if foreign else partial.etag)
        except BrokenFile:
            partial.forget()
            if not resumed:
                raise
            raise ConnectionFailed(
                0, "INTERRUPTED", "the resumed download does not fit together"
            ) from None
        except FLError as error:
            if error.status == 416:
                partial.forget()
                raise ConnectionFailed(0, "INTERRUPTED", "nothing left to resume") from None
            raise

    digest: str = transport.patiently(once, progress=lambda: partial.size)
    return digest


class _Partial:
    """The bytes so far, and beside them the ETag that they belong to."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.path = target.with_name(target.name + ".part")
        self._note = target.with_name(target.name + ".part.etag")

    @property
    def etag(self) -> str:
        return self._note.read_text() if self._note.exists() else ""

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() and self.etag else 0

    def begin(self, etag: str) -> None:
        self.path.write_bytes(b"")
        self._note.write_text(etag)

    def forget(self) -> None:
        self.path.unlink(missing_ok=True)
        self._note.unlink(missing_ok=True)

    def finish(self, expected: str | None) -> str:
        found = sha256_of(self.path)
        if found != expected:
            raise BrokenFile(
                0, "DIGEST_MISMATCH", f"{self.target.name} has digest {found}, not {expected}"
            )
        self.path.replace(self.target)
        self._note.unlink(missing_ok=True)
        return found


def _transfer(transport: Transport, url: str, partial: _Partial, accept: str) -> None:
    headers = {"Accept": accept}
    if partial.size:
        headers |= {"Range": f"bytes={partial.size}-", "If-Range": f'"{partial.etag}"'}
    with transport.stream(url, headers) as response:
        etag = _digest(response)
        if not (response.status_code == 206 and _continues(response, partial, etag)):
            if response.status_code == 206:
                partial.forget()
                raise ConnectionFailed(0, "INTERRUPTED", "the server resumes something else")
            partial.begin(etag)
        with partial.path.open("ab") as file:
            for chunk in response.iter_raw():
                file.write(chunk)


def _digest(response: httpx.Response) -> str:
    """The ETag without quotes; a proxy may have weakened it, the bytes are checked anyway."""
    etag = str(response.headers.get("ETag", "")).removeprefix("W/").strip('"').lower()
    if not etag:
        raise BrokenFile(0, "NO_DIGEST", f"{response.url} came without a digest to check it with")
    return etag


def _continues(response: httpx.Response, partial: _Partial, etag: str) -> bool:
    start = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("-")[0]
    return etag == partial.etag and start == str(partial.size)
