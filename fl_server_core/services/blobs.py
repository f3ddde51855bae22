"""Blobs: a file first, then its row; on the way out the mark, the file, and the row last."""

import os
from datetime import timedelta
from pathlib import Path

from django.conf import settings
from django.core.files.storage import FileSystemStorage
from django.db import DatabaseError
from django.db.models import F, Q
from django.utils import timezone

from fl_server_core.killpoints import around, reached
from fl_server_core.models import Blob
from fl_server_core.storage import store, weights_storage

UNREFERENCED = Q(
    versions__isnull=True,
    states__isnull=True,
    shared_by__isnull=True,
    extras_of__isnull=True,
    mask_of__isnull=True,
    local_models__isnull=True,
    preprocessing_of__isnull=True,
    template_of__isnull=True,
    members_of__isnull=True,
    first_moment_of__isnull=True,
    second_moment_of__isnull=True,
    deviations_of__isnull=True,
    inputs_of__isnull=True,
    results_of__isnull=True,
    slices_of__isnull=True,
)


def blob_store(
    *, source: Path, digest: str, size: int, suffix: str = ".safetensors", synced: bool = True
) -> Blob:
    """Move a staging file into the storage. The row is unsaved: it belongs in the caller's transaction.

    A file that is not `synced` is no promise; `DurableStorage.sync` makes it one.
    """
    name = store(source, digest=digest, suffix=suffix, synced=synced)
    return Blob(name=name, digest=digest, size=size)


def blob_discard(*, blob: Blob) -> None:
    """Delete the file of a blob whose transaction did not happen.

    An error says only that something failed, perhaps after the commit: a file that a row names, or whose
    rows can't be asked for now, stays. The sweep deletes it later if it has no row.
    """
    try:
        kept = Blob.objects.filter(name=blob.name).exists()
    except DatabaseError:
        return
    if not kept:
        with around("blob.discard"):
            weights_storage().delete(blob.name)


def blobs_doom_unreferenced(*, ids: list[int] | None = None) -> int:
    """Mark blobs that nothing refers to; `ids` limits it. Marking twice changes nothing."""
    doomed = Blob.objects.filter(UNREFERENCED, doomed_at=None)
    if ids is not None:
        doomed = doomed.filter(pk__in=ids)
    return Blob.objects.filter(pk__in=list(doomed.values_list("pk", flat=True))).update(
        doomed_at=timezone.now()
    )


def blobs_delete_doomed() -> int:
    """Delete the files of doomed blobs, then their rows together; safe to repeat after a kill at any point."""
    storage = weights_storage()
    doomed = list(Blob.objects.filter(doomed_at__isnull=False).order_by("pk")[:1000])
    if not doomed:
        return 0
    rows = Blob.objects.filter(pk__in=[blob.pk for blob in doomed])
    # A mark may be of an unsynced commit; it must not be lost once its file is gone.
    rows.update(doomed_at=F("doomed_at"))
    with around("blob.delete"):
        for blob in doomed:
            storage.delete(blob.name)
            reached("blob.delete:file")
        rows.delete()
    return len(doomed)


def files_sweep(*, older_than: timedelta = timedelta(hours=24)) -> int:
    """Delete files that no row names: what kills left in staging, and between a rename and its commit."""
    limit = (timezone.now() - older_than).timestamp()
    removed = 0
    for folder, _, names in os.walk(settings.FL_STAGING_DIR):
        for path in (Path(folder, name) for name in names):
            if _is_older(path, limit):
                path.unlink(missing_ok=True)
                removed += 1
    storage = weights_storage()
    if isinstance(storage, FileSystemStorage) and Path(storage.location).exists():
        for path in Path(storage.location).glob("*/*"):
            name = str(path.relative_to(storage.location))
            if _is_older(path, limit) and not Blob.objects.filter(name=name).exists():
                path.unlink(missing_ok=True)
                removed += 1
    return removed


def _is_older(path: Path, limit: float) -> bool:
    """Whether a file was last written before this time (POSIX); one that somebody else has deleted was not."""
    try:
        return path.stat().st_mtime < limit
    except FileNotFoundError:
        return False
