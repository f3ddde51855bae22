"""A disk without room: 507 wherever it shows, nothing half-stored, and the same goes on when there is room."""

import io
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from django.conf import settings as configured
from rest_framework.test import APIClient

from fl_server_api.uploads import StagedFile
from fl_server_core.exceptions import OutOfSpace
from fl_server_core.models import Blob, GlobalModel
from tests.api.test_uploads import TUS, begin, identity, offset, patch
from tests.scenes import person

pytestmark = pytest.mark.django_db
ROOM = 2**24  # bytes; the tests' database has fewer


def packed() -> bytes:
    """A model of a bit more, which is written a second time in another form."""
    out = io.BytesIO()
    np.savez(out, w=np.ones(ROOM // 4 + 1000, np.float32))
    return out.getvalue()


DATA = packed()


@contextmanager
def full_disk(room: int = ROOM) -> Iterator[None]:
    """The kernel takes no more than `room` bytes of any file from this process: what fits, then an error.

    As a disk does that is full, and without the rights to make one.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    shutil.rmtree(configured.FL_STAGING_DIR, ignore_errors=True)
    yield
    shutil.rmtree(configured.FL_STAGING_DIR, ignore_errors=True)


@pytest.fixture
def client(login) -> APIClient:
    return login(person("actor", actor=True))


def left() -> list[str]:
    """Files in staging."""
    return sorted(path.name for path in Path(configured.FL_STAGING_DIR).rglob("*.*"))


def refused(answer: Any) -> bool:
    assert (answer.status_code, answer.json()["code"]) == (507, "OUT_OF_SPACE"), answer.content
    return True


def test_an_upload_keeps_what_fitted_and_goes_on_when_there_is_room(client: APIClient) -> None:
    url = begin(client, DATA)

    with full_disk():
        assert refused(patch(client, url, DATA))
        assert offset(client, url) == ROOM
        assert refused(patch(client, url, DATA[ROOM:], ROOM))
        assert offset(client, url) == ROOM

    assert patch(client, url, DATA[ROOM:], ROOM).status_code == 204
    form = {"name": "m", "description": "d", "upload": identity(url)}
    with full_disk():
        assert refused(client.post("/api/models/", form, format="multipart"))
    assert not GlobalModel.objects.exists()
    assert left() == [f"{identity(url)}.part", f"{identity(url)}.writer"]
    assert client.post("/api/models/", form, format="multipart").status_code == 201


def test_a_form_leaves_nothing_and_is_taken_when_there_is_room(client: APIClient) -> None:
    def send() -> Any:
        form = {"name": "m", "description": "d", "model_file": io.BytesIO(DATA)}
        return client.post("/api/models/", form, format="multipart", HTTP_IDEMPOTENCY_KEY="one")

    with full_disk():
        assert refused(send())

    assert not left()
    assert not GlobalModel.objects.exists()
    assert not Blob.objects.exists()
    assert send().status_code == 201


def test_the_smallest_file_of_a_form_shows_at_once_that_the_disk_is_full() -> None:
    staged = StagedFile("f", None, 10)

    with full_disk(0):
        with pytest.raises(OutOfSpace):
            staged.add(b"x")
        staged.finish()
        staged.close()

    assert not left()


def test_a_disk_without_room_for_the_mark_of_who_writes_is_full_too(client: APIClient) -> None:
    url = begin(client, DATA)
    patch(client, url, DATA)
    mark = Path(configured.FL_STAGING_DIR) / "uploads" / f"{identity(url)}.writer"
    mark.unlink()
    mark.symlink_to("/dev/full")
    form = {"name": "m", "description": "d", "upload": identity(url)}

    asked = client.head(url, **TUS)
    named = client.post("/api/models/", form, format="multipart")

    assert asked.status_code == 507
    assert refused(named)
    mark.unlink()
    assert offset(client, url) == len(DATA)
    assert client.post("/api/models/", form, format="multipart").status_code == 201
