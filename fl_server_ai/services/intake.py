"""From an uploaded file to a durable canonical blob; nothing is left behind if anything is refused."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from django.conf import settings

from fl_server_ai.containers import Limits, Manifest, extract
from fl_server_core.exceptions import OutOfSpace
from fl_server_core.models import Blob
from fl_server_core.services.blobs import blob_store
from fl_server_core.storage import out_of_space, staging_path


class Publish:
    """Moves the canonical file into the storage when called, once; `path` is where it lies until then."""

    def __init__(self, path: Path, blob: Blob) -> None:
        self.path = path
        self._blob = blob

    def __call__(self) -> None:
        stored = blob_store(source=self.path, digest=self._blob.digest, size=self._blob.size)
        self._blob.name = stored.name


@contextmanager
def canonical_blob(file: Path, *, sha256: str | None) -> Iterator[tuple[Manifest, Blob, Publish]]:
    """Read any container into canonical form. Yields manifest, unsaved blob, and how to publish it.

    `sha256` is the digest of `file` where the upload has computed it already. A full disk is
    `OutOfSpace`. Both files are gone afterwards, unless published.
    """
    path = staging_path(".safetensors")
    try:
        extracted = extract(
            file, path, limits=Limits(file_bytes=settings.FL_MAX_MODEL_BYTES), sha256=sha256
        )
        blob = Blob(digest=extracted.digest, size=extracted.size)
        yield extracted.manifest, blob, Publish(path, blob)
    except OSError as error:
        if out_of_space(error):
            raise OutOfSpace("the server's disk is full; nothing was stored") from error
        raise
    finally:
        path.unlink(missing_ok=True)
        file.unlink(missing_ok=True)
