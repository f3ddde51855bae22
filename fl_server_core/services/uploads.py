"""Uploads in pieces: created, continued where they broke off, checked when complete, and used once."""

import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from django.conf import settings
from django.db import transaction
from django.db.models import QuerySet
from django.utils import timezone

from fl_server_core.connections import connection_release
from fl_server_core.exceptions import (
    ChecksumMismatch,
    Conflict,
    Invalid,
    OutOfSpace,
    TooLarge,
    Unusable,
)
from fl_server_core.killpoints import around, committing
from fl_server_core.models import LocalModel, Upload, User
from fl_server_core.services.parts import Parts
from fl_server_core.services.quotas import storage_check
from fl_server_core.storage import staging_path

KEPT = timedelta(hours=24)  # since the last byte, or since it was named last
AT_ONCE = 500  # rows that are forgotten in one transaction


@dataclass(frozen=True)
class Taken:
    """A complete upload as a staged file of its own, or the update that it has already become."""

    upload: Upload
    staged_path: Path
    sha256: str


@committing("upload.create")
def upload_create(*, owner: User, length: int, sha256: str = "", metadata: str = "") -> Upload:
    """Announce a file. `OutOfSpace` at once if the disk could not take it, however long it takes to come.

    Whose uploads are too many loses the oldest one that no byte has come for: an answer that was lost on its
    way leaves one that nobody knows of. Where bytes have come for all, it is a `Conflict`.
    """
    if length < 1:
        raise Invalid("Upload-Length is at least 1", code="BAD_LENGTH")
    if length > settings.FL_MAX_MODEL_BYTES:
        raise TooLarge(f"{length:,} bytes; a file may have {settings.FL_MAX_MODEL_BYTES:,}")
    user = User.objects.select_for_update(no_key=True).get(pk=owner.pk)  # one after the other
    waiting = Upload.objects.filter(owner=owner, used_at=None, expires_at__gt=timezone.now())
    if waiting.count() >= settings.FL_UPLOADS:
        _make_room(waiting)
    storage_check(user=user, size=length)
    parts = Parts.folder()
    if shutil.disk_usage(parts).free < length:
        raise OutOfSpace("the server's disk has no room for this file; nothing was stored")
    upload = Upload.objects.create(
        owner=owner,
        length=length,
        sha256=sha256,
        metadata=metadata,
        expires_at=timezone.now() + KEPT,
    )
    Parts(upload.pk).create()
    return upload


def _make_room(waiting: QuerySet[Upload]) -> None:
    """Forget the oldest upload without a byte. Who begins to send one just now is told that it is gone."""
    for upload in waiting.filter(finished_at=None).order_by("expires_at", "pk"):
        parts = Parts(upload.pk)
        if parts.size() == 0:
            upload.delete()
            transaction.on_commit(parts.delete)
            return
    raise Conflict(
        f"{waiting.count()} of your uploads are not used yet; use or delete some, or let them expire",
        code="TOO_MANY_UPLOADS",
    )


def upload_offset(upload: Upload) -> int:
    """How many bytes are here for good. Whoever still sends some is stopped, so that the number stays true."""
    if upload.used_at is not None:
        return upload.length
    return Parts(upload.pk).stop_others()


def upload_append(
    upload: Upload, *, offset: int, blocks: Iterable[bytes], checksum: tuple[str, bytes] | None
) -> int:
    """Add bytes at `offset`; returns the new offset. What arrives before the line breaks is kept.

    With a `checksum` (algorithm, digest) of the piece, it is kept whole or not at all. The last byte
    ends the upload: if its digest is not the announced one, it is deleted (DIGEST_MISMATCH).
    """
    if upload.used_at is not None or upload.finished_at is not None:
        raise Conflict("this upload is complete", code="OFFSET_MISMATCH", offset=upload.length)
    parts = Parts(upload.pk)
    found = parts.stop_others()
    if found != offset:
        raise Conflict(
            f"{found} bytes are here; go on from there, not from {offset}",
            code="OFFSET_MISMATCH",
            offset=found,
        )
    upload.expires_at = timezone.now() + KEPT
    Upload.objects.filter(pk=upload.pk).update(expires_at=upload.expires_at)
    connection_release()  # the bytes may take hours
    with parts.writing() as write, around("upload.append"):
        if checksum is None:
            offset = _receive(write, blocks, offset, upload.length)
        else:
            with parts.whole():
                offset = _receive(write, _summed(blocks, *checksum), offset, upload.length)
    if offset == upload.length:
        upload_finish(upload)
    return offset


def _receive(
    write: Callable[[bytes], None], blocks: Iterable[bytes], offset: int, length: int
) -> int:
    for block in blocks:
        if offset + len(block) > length:
            raise TooLarge(f"more than the announced {length:,} bytes")
        write(block)
        offset += len(block)
    return offset


def _summed(blocks: Iterable[bytes], algorithm: str, digest: bytes) -> Iterator[bytes]:
    """The same blocks; `ChecksumMismatch` after the last if they are not what the client sent."""
    found = hashlib.new(algorithm, usedforsecurity=False)
    for block in blocks:
        found.update(block)
        yield block
    if found.digest() != digest:
        raise ChecksumMismatch("the piece is not what its checksum says; send it again")


def upload_finish(upload: Upload) -> None:
    """Check a file that has arrived to its last byte; done already, nothing happens."""
    if upload.finished_at is not None:
        return
    found = Parts(upload.pk).sha256()
    if upload.sha256 and found != upload.sha256:
        announced = upload.sha256
        upload_delete(upload)
        raise Unusable(
            f"the file has SHA-256 {found}, announced was {announced}; it changed on the way, or "
            "while it was sent: send it again",
            code="DIGEST_MISMATCH",
        )
    now = timezone.now()
    with around("upload.finish"):
        Upload.objects.filter(pk=upload.pk).update(sha256=found, finished_at=now)
    upload.sha256, upload.finished_at = found, now


def upload_delete(upload: Upload) -> None:
    """Forget an upload and its bytes; what it has become already stays."""
    Upload.objects.filter(pk=upload.pk).delete()
    Parts(upload.pk).delete()


@contextmanager
def upload_taken(upload: Upload) -> Iterator[Taken]:
    """A complete upload as a file that may be consumed; the upload itself stays until `upload_used`.

    So a kill in between costs nothing: the same request again finds it as it was.
    """
    if upload.used_at is not None:
        raise Conflict("this upload was used already", code="UPLOAD_USED")
    parts = Parts(upload.pk)
    here = parts.stop_others()
    if here != upload.length:
        raise Conflict(
            f"{here:,} of {upload.length:,} bytes are here; send the rest first",
            code="UPLOAD_INCOMPLETE",
            offset=here,
        )
    upload_finish(upload)
    path = staging_path(".upload")
    try:
        parts.link(path)
        yield Taken(upload, path, upload.sha256)
    finally:
        path.unlink(missing_ok=True)


def upload_used(upload: Upload, *, update: LocalModel | None = None) -> None:
    """Its bytes have become something that is committed; the file is no longer needed."""
    with around("upload.used"):
        Upload.objects.filter(pk=upload.pk).update(used_at=timezone.now(), update=update)
    Parts(upload.pk).delete()


def uploads_delete_expired() -> int:
    """Forget what nobody has gone on with for a day, and what was used so long ago; returns how many that were.

    One request may send for days: where bytes have come meanwhile, the day begins with the last one.
    Rows go before their files, in transactions of `AT_ONCE`: what a kill in between leaves, `files_sweep` takes.
    """
    now = timezone.now()
    expired = Upload.objects.filter(expires_at__lt=now)
    deleted = 0
    # What was looked at is no longer among the expired: forgotten, or gone on with.
    while batch := list(expired.order_by("expires_at").values_list("pk", flat=True)[:AT_ONCE]):
        dead = [pk for pk in batch if not _goes_on(expired.filter(pk=pk), Parts(pk), now)]
        with transaction.atomic():
            locked = expired.filter(pk__in=dead).order_by("pk").select_for_update()
            gone = list(locked.values_list("pk", flat=True))
            Upload.objects.filter(pk__in=gone).delete()
        for pk in gone:
            Parts(pk).delete()
        deleted += len(gone)
    return deleted


def _goes_on(upload: QuerySet[Upload], parts: Parts, now: datetime) -> bool:
    """Whether bytes have come less than a day ago; then its time is a day from the last one."""
    touched = parts.touched()
    if touched is None or touched + KEPT <= now:
        return False
    upload.update(expires_at=touched + KEPT)
    return True
