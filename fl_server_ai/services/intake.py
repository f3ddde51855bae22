"""From an uploaded file to a durable canonical blob; nothing is left behind if anything is refused."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from django.conf import settings

from fl_server_ai.containers import Extracted, Limits, Manifest, extract
from fl_server_ai.received.form import Form, form_of
from fl_server_ai.received.store import Received, Written, receive
from fl_server_ai.received.wanted import Wanted
from fl_server_core.models import Blob, Training
from fl_server_core.services.blobs import blob_store
from fl_server_core.storage import local_path, needs_room, staging_path


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
    with _extracted(file, path, sha256) as extracted:
        blob = Blob(digest=extracted.digest, size=extracted.size)
        yield extracted.manifest, blob, Publish(path, blob)


@contextmanager
def _extracted(file: Path, path: Path, sha256: str | None) -> Iterator[Extracted]:
    limits = Limits(file_bytes=settings.FL_MAX_MODEL_BYTES)
    try:
        with needs_room():
            yield extract(file, path, limits=limits, sha256=sha256)
    finally:
        path.unlink(missing_ok=True)
        file.unlink(missing_ok=True)


@contextmanager
def update_received(
    file: Path,
    *,
    sha256: str | None,
    training: Training,
    wanted: Wanted,
    base: Callable[[Form], Blob],
) -> Iterator[tuple[Received, Form]]:
    """Read an update of any container, kind and encoding; its files lie in staging until the end.

    `base(form)` says which weights a delta is from, and what is left out is filled from.
    """
    path = staging_path(".safetensors")
    with ExitStack() as stack:
        extracted = stack.enter_context(_extracted(file, path, sha256))
        form = form_of(extracted.metadata, takes=wanted.strategy.takes)
        yield (
            receive(
                sent=Written(path, extracted.digest),
                manifest=extracted.manifest,
                form=form,
                base=stack.enter_context(local_path(base(form))),
                wanted=wanted,
                ties=training.model.ties,
                staged=partial(staging_path, ".safetensors"),
                stack=stack,
            ),
            form,
        )


def published(written: Written, suffix: str = ".safetensors") -> Blob:
    """Move a file that was received into the storage; its row is unsaved."""
    size = written.size
    return blob_store(source=written.path, digest=written.digest, size=size, suffix=suffix)
