import hashlib
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings

from fl_server_core.models import Blob
from fl_server_core.services.blobs import (
    blob_store,
    blobs_delete_doomed,
    blobs_doom_unreferenced,
    files_sweep,
)
from fl_server_core.storage import local_path, weights_storage
from tests.scenes import scene, staged

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def own_folders(settings, tmp_path: Path) -> None:
    settings.FL_STAGING_DIR = tmp_path / "staging"
    settings.STORAGES = {
        **settings.STORAGES,
        "weights": {
            "BACKEND": "fl_server_core.storage.DurableStorage",
            "OPTIONS": {"location": tmp_path / "weights"},
        },
    }


def files() -> set[str]:
    root = Path(weights_storage().location)
    return {str(path.relative_to(root)) for path in root.glob("*/*")}


def make(data: bytes) -> Blob:
    digest = hashlib.sha256(data).hexdigest()
    return blob_store(source=staged(data), digest=digest, size=len(data))


def test_a_blob_is_found_under_its_digest_and_nothing_stays_in_staging() -> None:
    blob = make(b"weights")

    with local_path(blob) as path:
        assert path.read_bytes() == b"weights"
    assert Path(blob.name).name.startswith(blob.digest)
    assert not list(Path(settings.FL_STAGING_DIR).iterdir())


def test_equal_bytes_are_separate_files_so_that_deleting_one_keeps_the_other() -> None:
    one, two = make(b"same"), make(b"same")
    one.save()
    two.save()
    Blob.objects.filter(pk=one.pk).update(doomed_at="2026-01-01T00:00Z")

    blobs_delete_doomed()

    assert files() == {two.name}


def test_only_what_nothing_refers_to_is_doomed() -> None:
    running = scene()
    loose = make(b"loose")
    loose.save()

    assert blobs_doom_unreferenced() == 1
    assert blobs_delete_doomed() == 1

    assert Blob.objects.get() == running.now.model.weights.blob
    assert running.current()


def test_a_kill_between_file_and_row_is_finished_by_the_next_sweep() -> None:
    loose = make(b"loose")
    loose.save()
    blobs_doom_unreferenced()
    weights_storage().delete(loose.name)  # killed here: the file is gone, the row is not

    blobs_delete_doomed()

    assert not Blob.objects.exists()


def test_a_kill_between_rename_and_commit_leaves_no_orphan_for_long() -> None:
    kept = make(b"kept")
    kept.save()
    make(b"its row was never committed")
    staged(b"half an upload")

    assert files_sweep(older_than=timedelta(hours=1)) == 0  # it could still be on its way
    assert files_sweep(older_than=timedelta(0)) == 2

    assert files() == {kept.name}
    assert not list(Path(settings.FL_STAGING_DIR).iterdir())


@pytest.mark.parametrize("where", ["staging", "weights"])
def test_a_file_that_another_process_deletes_meanwhile_stops_no_sweep(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    staged(b"half an upload"), staged(b"another")
    make(b"its row was never committed"), make(b"nor was this one's")
    folder = Path(settings.FL_STAGING_DIR if where == "staging" else weights_storage().location)
    stat, seen = Path.stat, []

    def and_deleted(self: Path, **given: Any) -> os.stat_result:
        if self.is_relative_to(folder) and self.suffix:
            seen.append(self)
            if len(seen) == 2:
                self.unlink()
        return stat(self, **given)

    monkeypatch.setattr(Path, "stat", and_deleted)

    assert files_sweep(older_than=timedelta(0)) == 3
    assert not files()
    assert not list(Path(settings.FL_STAGING_DIR).iterdir())
