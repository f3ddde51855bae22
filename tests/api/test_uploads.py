"""Resumable uploads (tus 1.0.0): nothing sent twice, nothing unfinished used, nothing used twice."""

import base64
import hashlib
import io
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from django.conf import settings as django_settings
from django.core.files.uploadedfile import SimpleUploadedFile
from django.test import Client
from django.utils import timezone
from rest_framework.test import APIClient
from safetensors.numpy import save

from fl_server_ai.services import updates
from fl_server_ai.services.updates import NAMED
from fl_server_core.exceptions import Conflict, NotFound
from fl_server_core.models import GlobalModel, LocalModel, Upload
from fl_server_core.services import parts, rounds, uploads
from fl_server_core.services.blobs import files_sweep
from fl_server_core.storage import local_path
from tests.scenes import Scene, person, scene, weights

pytestmark = pytest.mark.django_db
TUS = {"HTTP_TUS_RESUMABLE": "1.0.0"}
DATA = save(weights(1.0))


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    yield
    shutil.rmtree(Path(django_settings.FL_STAGING_DIR) / "uploads", ignore_errors=True)


def packed(data: bytes) -> str:
    return base64.b64encode(data).decode()


def announce(client: APIClient, length: int = len(DATA), **headers: Any) -> Any:
    given = {"HTTP_UPLOAD_LENGTH": str(length), **TUS, **headers}
    return client.post("/api/uploads/", **given)


def begin(client: APIClient, data: bytes = DATA, *, digest: bytes | None = None) -> str:
    """The address of a new upload of `data`."""
    told = hashlib.sha256(data if digest is None else digest).hexdigest().encode()
    answer = announce(client, len(data), HTTP_UPLOAD_METADATA=f"sha256 {packed(told)}")
    assert answer.status_code == 201
    return answer["Location"]


def patch(client: APIClient, url: str, data: bytes, offset: int = 0, **headers: Any) -> Any:
    return client.generic(
        "PATCH",
        url,
        data,
        content_type=headers.pop("content_type", "application/offset+octet-stream"),
        **{"HTTP_UPLOAD_OFFSET": str(offset), **TUS, **headers},
    )


def offset(client: APIClient, url: str) -> int:
    return int(client.head(url, **TUS)["Upload-Offset"])


def identity(url: str) -> str:
    return url.rstrip("/").rpartition("/")[2]


@pytest.fixture
def running() -> Scene:
    return scene()


@pytest.fixture
def ada(login, running: Scene) -> APIClient:
    return login(running.sites["ada"])


def test_an_upload_in_three_pieces_becomes_an_update(ada, running: Scene) -> None:
    url = begin(ada)
    for start in range(0, len(DATA), 100):
        answer = patch(ada, url, DATA[start : start + 100], start)
        assert (answer.status_code, answer["Tus-Resumable"]) == (204, "1.0.0")
        assert int(answer["Upload-Offset"]) == min(start + 100, len(DATA)) == offset(ada, url)

    form = {"round": 0, "sample_size": 2, "upload": identity(url)}
    sent = ada.post(f"/api/models/{running.training.model_id}/", form, format="multipart")

    assert sent.status_code == 201
    update = LocalModel.objects.get(pk=sent.json()["update_id"])
    assert update.digest == hashlib.sha256(DATA).hexdigest()
    assert not list((Path(django_settings.FL_STAGING_DIR) / "uploads").glob(f"{identity(url)}*"))


def test_the_result_of_a_task_names_its_upload_and_may_be_sent_again(ada, running: Scene) -> None:
    url = begin(ada)
    patch(ada, url, DATA)
    form = {"meta": '{"num_examples": 2}', "upload": identity(url)}
    address = f"/api/tasks/{running.task('ada').pk}/result/"

    first = ada.post(address, form, format="multipart")
    again = ada.post(address, form, format="multipart")

    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json()["update_id"] == again.json()["update_id"]


def test_a_used_upload_becomes_nothing_else(ada, running: Scene) -> None:
    url = begin(ada)
    patch(ada, url, DATA)
    form = {"round": 0, "sample_size": 2, "upload": identity(url)}
    address = f"/api/models/{running.training.model_id}/"
    ada.post(address, form, format="multipart")

    other = ada.post(address, {**form, "sample_size": 3}, format="multipart")
    more = patch(ada, url, b"x", len(DATA))

    assert (other.status_code, other.json()["code"]) == (409, "UPLOAD_USED")
    assert (more.status_code, more.json()["code"]) == (409, "OFFSET_MISMATCH")


def test_a_model_comes_as_an_upload_and_the_same_key_makes_no_second_one(login) -> None:
    client = login(person("researcher", actor=True))
    url = begin(client)
    patch(client, url, DATA)
    form = {"name": "m", "description": "d", "upload": identity(url)}

    key = {"HTTP_IDEMPOTENCY_KEY": "one"}
    first = client.post("/api/models/", form, format="multipart", **key)
    again = client.post("/api/models/", form, format="multipart", **key)
    without = client.post("/api/models/", form, format="multipart")

    assert (first.status_code, again.json()) == (201, first.json())
    assert (without.status_code, without.json()["code"]) == (409, "UPLOAD_USED")
    assert GlobalModel.objects.count() == 1


def test_an_unfinished_upload_is_not_used_and_can_go_on(ada, running: Scene) -> None:
    url = begin(ada)
    patch(ada, url, DATA[:100])
    form = {"round": 0, "sample_size": 2, "upload": identity(url)}
    address = f"/api/models/{running.training.model_id}/"

    early = ada.post(address, form, format="multipart")
    patch(ada, url, DATA[100:], 100)

    assert (early.status_code, early.json()["code"]) == (409, "UPLOAD_INCOMPLETE")
    assert early.json()["offset"] == 100
    assert ada.post(address, form, format="multipart").status_code == 201


def test_a_refused_update_leaves_the_upload_and_the_round_as_they_were(ada, running: Scene) -> None:
    bad = save({"other": weights()["layer.bias"]})
    url = begin(ada, bad)
    patch(ada, url, bad)
    form = {"round": 0, "sample_size": 2, "upload": identity(url)}

    refused = ada.post(f"/api/models/{running.training.model_id}/", form, format="multipart")

    assert (refused.status_code, refused.json()["code"]) == (422, "KEY_MISMATCH")
    assert running.task("ada").state == "open"
    assert offset(ada, url) == len(bad)


def test_where_too_many_updates_wait_another_is_told_to_come_again_and_loses_nothing(
    ada, running: Scene, settings
) -> None:
    settings.FL_TRANSFER_THREADS = 4
    url = begin(ada)
    patch(ada, url, DATA)
    form = {"round": 0, "sample_size": 2, "upload": identity(url)}
    address = f"/api/models/{running.training.model_id}/"

    with NAMED.one("grace"), NAMED.one("alan"):
        busy = ada.post(address, form, format="multipart")
    again = ada.post(address, form, format="multipart")

    assert (busy.status_code, busy.json()["code"], busy["Retry-After"]) == (503, "BUSY", "5")
    assert again.status_code == 201
    assert NAMED.taken() == 0


def test_a_flipped_byte_is_refused_and_the_upload_is_gone(ada) -> None:
    url = begin(ada)

    answer = patch(ada, url, DATA[:-1] + bytes([DATA[-1] ^ 1]))

    assert (answer.status_code, answer.json()["code"]) == (422, "DIGEST_MISMATCH")
    assert ada.head(url, **TUS).status_code == 404


@pytest.mark.parametrize("name", ["sha1", "sha256"])
def test_a_piece_with_a_checksum_is_kept_whole_or_not_at_all(ada, name: str) -> None:
    url = begin(ada)
    good = f"{name} {packed(hashlib.new(name, DATA[:100]).digest())}"

    kept = patch(ada, url, DATA[:100], HTTP_UPLOAD_CHECKSUM=good)
    lost = patch(ada, url, b"x" * 100, 100, HTTP_UPLOAD_CHECKSUM=good)

    assert kept.status_code == 204
    assert (lost.status_code, lost.json()["code"]) == (460, "CHECKSUM_MISMATCH")
    assert offset(ada, url) == 100


def test_what_arrived_before_the_line_broke_is_kept(ada) -> None:
    url = begin(ada)
    broken = patch(ada, url, DATA, **{"wsgi.input": io.BytesIO(DATA[:150])})

    assert (broken.status_code, broken.json()["code"]) == (400, "BODY_INTERRUPTED")
    assert offset(ada, url) == 150
    assert patch(ada, url, DATA[150:], 150).status_code == 204


def test_a_piece_with_a_checksum_that_broke_off_is_taken_back(ada) -> None:
    url = begin(ada)
    check = f"sha256 {packed(hashlib.sha256(DATA).digest())}"

    cut = {"wsgi.input": io.BytesIO(DATA[:150])}
    broken = patch(ada, url, DATA, HTTP_UPLOAD_CHECKSUM=check, **cut)

    assert broken.json()["code"] == "BODY_INTERRUPTED"
    assert offset(ada, url) == 0


def test_another_offset_than_the_servers_is_refused_with_the_right_one(ada) -> None:
    url = begin(ada)
    patch(ada, url, DATA[:100])

    answer = patch(ada, url, DATA, 0)

    assert (answer.status_code, answer.json()["code"]) == (409, "OFFSET_MISMATCH")
    assert answer.json()["offset"] == 100


def test_whoever_asks_for_the_offset_stops_a_writer_that_hangs(ada) -> None:
    url = begin(ada)
    upload = Upload.objects.get()

    def hanging() -> Iterator[bytes]:
        yield DATA[:50]
        assert offset(ada, url) == 50
        yield DATA[50:60]

    with pytest.raises(Conflict) as stopped:
        uploads.upload_append(upload, offset=0, blocks=hanging(), checksum=None)

    assert stopped.value.error_code == "UPLOAD_TAKEN_OVER"
    assert offset(ada, url) == 50
    assert patch(ada, url, DATA[50:], 50).status_code == 204


@pytest.mark.parametrize("last", [True, False], ids=["at its end", "in its middle"])
def test_whoever_stops_a_piece_with_a_checksum_takes_it_back(ada, last: bool) -> None:
    url = begin(ada)
    patch(ada, url, DATA[:100])
    upload = Upload.objects.get()

    def hanging() -> Iterator[bytes]:
        yield DATA[100:150]
        assert offset(ada, url) == 100
        if not last:
            yield DATA[150:160]

    checksum = ("sha256", hashlib.sha256(DATA[100:150]).digest())
    with pytest.raises(Conflict) as stopped:
        uploads.upload_append(upload, offset=100, blocks=hanging(), checksum=checksum)

    assert stopped.value.error_code == "UPLOAD_TAKEN_OVER"
    assert offset(ada, url) == 100
    assert patch(ada, url, DATA[100:], 100).status_code == 204


def test_a_kill_takes_back_a_piece_that_was_to_come_whole(ada, running: Scene) -> None:
    url = begin(ada)
    patch(ada, url, DATA[:100])
    killed = parts.Parts(Upload.objects.get().pk)
    killed.stop_others()
    pieces = ExitStack()  # what it would do at its end comes too late
    write = pieces.enter_context(killed.writing())
    pieces.enter_context(killed.whole())
    write(DATA[100:])
    form = {"round": 0, "sample_size": 2, "upload": identity(url)}

    named = ada.post(f"/api/models/{running.training.model_id}/", form, format="multipart")

    assert (named.status_code, named.json()["code"]) == (409, "UPLOAD_INCOMPLETE")
    assert offset(ada, url) == 100
    with pytest.raises(Conflict):
        pieces.close()
    assert patch(ada, url, DATA[100:], 100).status_code == 204


def test_a_kill_before_the_digest_was_checked_costs_nothing(ada, running: Scene) -> None:
    url = begin(ada)
    patch(ada, url, DATA)
    Upload.objects.update(finished_at=None)  # as if killed between the last byte and the commit

    form = {"round": 0, "sample_size": 2, "upload": identity(url)}
    sent = ada.post(f"/api/models/{running.training.model_id}/", form, format="multipart")

    assert sent.status_code == 201


def test_a_file_that_the_disk_could_not_take_is_refused_when_it_is_announced(ada, settings) -> None:
    settings.FL_MAX_MODEL_BYTES, settings.FL_USER_BYTES = 2**59, 0

    answer = announce(ada, 2**59)

    assert (answer.status_code, answer.json()["code"]) == (507, "OUT_OF_SPACE")
    assert not Upload.objects.exists()


def test_an_announcement_that_is_sent_again_is_one_upload_while_that_is_there(ada) -> None:
    key = {"HTTP_IDEMPOTENCY_KEY": "k"}

    first, again = announce(ada, **key), announce(ada, **key)
    another = announce(ada, len(DATA) + 1, **key)
    ada.delete(first["Location"], **TUS)
    gone = announce(ada, **key)

    assert (first.status_code, again.status_code) == (201, 201)
    assert first["Location"] == again["Location"]
    assert first["Upload-Expires"] == again["Upload-Expires"]
    assert (another.status_code, another.json()["code"]) == (409, "IDEMPOTENCY_MISMATCH")
    assert (gone.status_code, gone.json()["code"]) == (404, "UPLOAD_GONE")
    assert not Upload.objects.exists()


def test_each_piece_puts_the_end_off_and_its_answer_says_so(ada) -> None:
    url = begin(ada)
    Upload.objects.update(expires_at=timezone.now() + timedelta(hours=1))

    told = parsedate_to_datetime(patch(ada, url, DATA[:10])["Upload-Expires"])

    assert told > timezone.now() + timedelta(hours=23)
    assert told == Upload.objects.get().expires_at.replace(microsecond=0)


WRONG: dict[str, tuple[dict[str, Any], int, str]] = {
    "no length": ({"HTTP_UPLOAD_LENGTH": ""}, 400, "BAD_HEADER"),
    "a length that is a word": ({"HTTP_UPLOAD_LENGTH": "many"}, 400, "BAD_HEADER"),
    "a negative length": ({"HTTP_UPLOAD_LENGTH": "-1"}, 400, "BAD_HEADER"),
    "a length of 40 digits": ({"HTTP_UPLOAD_LENGTH": "9" * 40}, 400, "BAD_HEADER"),
    "nothing to send": ({"HTTP_UPLOAD_LENGTH": "0"}, 400, "BAD_LENGTH"),
    "more than allowed": ({"HTTP_UPLOAD_LENGTH": str(2**50)}, 413, "TOO_LARGE"),
    "no version": ({"HTTP_TUS_RESUMABLE": ""}, 412, "TUS_VERSION"),
    "another version": ({"HTTP_TUS_RESUMABLE": "0.2.2"}, 412, "TUS_VERSION"),
    "a digest that is none": ({"HTTP_UPLOAD_METADATA": "sha256 eA=="}, 400, "BAD_HEADER"),
    "metadata that is no base64": ({"HTTP_UPLOAD_METADATA": "sha256 ?"}, 400, "BAD_HEADER"),
    "endless metadata": ({"HTTP_UPLOAD_METADATA": "a" * 5000}, 400, "BAD_HEADER"),
}


@pytest.mark.parametrize(("headers", "status", "code"), WRONG.values(), ids=list(WRONG))
def test_a_bad_announcement_has_its_own_code(ada, headers, status: int, code: str) -> None:
    answer = announce(ada, **headers)

    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert not Upload.objects.exists()


PIECES: dict[str, tuple[dict[str, Any], int, str]] = {
    "no offset": ({"HTTP_UPLOAD_OFFSET": ""}, 400, "BAD_HEADER"),
    "another media type": ({"content_type": "text/plain"}, 415, "UNSUPPORTED_MEDIA_TYPE"),
    "an unknown checksum": ({"HTTP_UPLOAD_CHECKSUM": "crc32 eA=="}, 400, "BAD_CHECKSUM"),
    "a short checksum": ({"HTTP_UPLOAD_CHECKSUM": "sha1 eA=="}, 400, "BAD_CHECKSUM"),
    "a checksum that is no ASCII": ({"HTTP_UPLOAD_CHECKSUM": "sha256 \xe9"}, 400, "BAD_HEADER"),
    "no version": ({"HTTP_TUS_RESUMABLE": ""}, 412, "TUS_VERSION"),
}


@pytest.mark.parametrize(("headers", "status", "code"), PIECES.values(), ids=list(PIECES))
def test_a_bad_piece_has_its_own_code_and_changes_nothing(ada, headers, status, code) -> None:
    url = begin(ada)

    answer = patch(ada, url, DATA, **headers)

    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert offset(ada, url) == 0


def test_more_than_announced_is_refused(ada) -> None:
    url = begin(ada)

    answer = patch(ada, url, DATA + b"x")

    assert (answer.status_code, answer.json()["code"]) == (413, "TOO_LARGE")


def test_uploads_that_are_begun_are_not_more_than_allowed(ada, settings) -> None:
    settings.FL_UPLOADS = 2
    for _ in range(2):
        patch(ada, begin(ada), DATA[:1])

    third = announce(ada)

    assert (third.status_code, third.json()["code"]) == (409, "TOO_MANY_UPLOADS")


def test_announcements_whose_answers_were_lost_lock_nobody_out(
    ada, settings, django_capture_on_commit_callbacks
) -> None:
    settings.FL_UPLOADS = 2
    begun = begin(ada)
    patch(ada, begun, DATA[:100])

    with django_capture_on_commit_callbacks(execute=True):
        unheard = [begin(ada) for _ in range(5)]
        heard = begin(ada)
    patch(ada, heard, DATA)

    assert offset(ada, begun) == 100
    assert offset(ada, heard) == len(DATA)
    assert {ada.head(url, **TUS).status_code for url in unheard} == {404}
    left = {path.stem for path in (Path(django_settings.FL_STAGING_DIR) / "uploads").glob("*.part")}
    assert left == {identity(begun), identity(heard)}


def test_a_complete_upload_makes_no_room(ada, settings) -> None:
    settings.FL_UPLOADS = 1
    patch(ada, begin(ada), DATA)

    assert announce(ada).status_code == 409


def test_others_and_admins_see_and_continue_none_of_mine(ada, login) -> None:
    url = begin(ada)

    for name, fields in (("eve", {"client": True}), ("root", {"is_superuser": True})):
        other = login(person(name, **fields))
        assert other.head(url, **TUS).status_code == 404
        assert patch(other, url, DATA).status_code == 404
        assert other.delete(url, **TUS).status_code == 404
        assert other.get("/api/uploads/").json() == []


def test_given_up_uploads_and_old_ones_leave_nothing(ada) -> None:
    one, two = begin(ada), begin(ada)
    patch(ada, one, DATA[:10]), patch(ada, two, DATA[:10])
    Upload.objects.filter(pk=identity(two)).update(expires_at=timezone.now() - timedelta(seconds=1))
    aged(identity(two), "part")

    deleted = ada.delete(one, **TUS)
    expired = uploads.uploads_delete_expired()

    assert (deleted.status_code, expired) == (204, 1)
    assert not Upload.objects.exists()
    folder = Path(django_settings.FL_STAGING_DIR) / "uploads"
    assert not [*folder.glob(f"{identity(one)}*"), *folder.glob(f"{identity(two)}*")]


def test_housekeeping_leaves_an_upload_alone_that_one_request_sends_for_days(ada) -> None:
    url = begin(ada)
    upload = Upload.objects.get()

    def slow() -> Iterator[bytes]:
        yield DATA[:50]
        Upload.objects.update(expires_at=timezone.now() - timedelta(hours=1))
        aged(identity(url), "writer")
        yield DATA[50:100]
        assert (uploads.uploads_delete_expired(), files_sweep()) == (0, 0)
        yield DATA[100:]

    reached = uploads.upload_append(upload, offset=0, blocks=slow(), checksum=None)

    assert reached == offset(ada, url) == len(DATA)
    left = Upload.objects.get().expires_at - timezone.now()
    assert timedelta(hours=23) < left < timedelta(hours=25)


def test_an_upload_that_is_named_after_a_day_is_not_swept_while_it_is_read_or_stored(
    ada, running: Scene, monkeypatch
) -> None:
    url = begin(ada)
    patch(ada, url, DATA)
    aged(identity(url), "part")
    received, accept = updates.update_received, rounds.update_accept
    swept = []

    def and_swept(work: Any) -> Any:
        def at_work(*args: Any, **given: Any) -> Any:
            swept.append(files_sweep())
            return work(*args, **given)

        return at_work

    monkeypatch.setattr(updates, "update_received", and_swept(received))
    monkeypatch.setattr(rounds, "update_accept", and_swept(accept))
    form = {"round": 0, "sample_size": 2, "upload": identity(url)}
    sent = ada.post(f"/api/models/{running.training.model_id}/", form, format="multipart")

    assert (sent.status_code, swept) == (201, [0, 0])
    stored = LocalModel.objects.get(pk=sent.json()["update_id"]).blob
    assert stored is not None
    with local_path(stored) as path:
        assert path.read_bytes() == DATA


def test_an_upload_that_is_named_again_after_a_kill_leaves_the_stored_file_as_it_is(
    ada, tmp_path: Path
) -> None:
    url = begin(ada)
    patch(ada, url, DATA)
    aged(identity(url), "part")
    upload, stored = parts.Parts(Upload.objects.get().pk), tmp_path / "stored"

    upload.link(stored)
    fresh = stored.stat().st_mtime
    then = fresh - 600
    os.utime(stored, (then, then))
    upload.link(tmp_path / "again")

    assert fresh > timezone.now().timestamp() - 600  # no sweep takes it while it is read
    assert stored.stat().st_mtime == then


def test_all_that_has_expired_is_forgotten_however_much_it_is(ada, monkeypatch) -> None:
    monkeypatch.setattr(uploads, "AT_ONCE", 2)
    owner, now = person("many", client=True), timezone.now()

    def made(number: int, hours: int, **fields: Any) -> list[Upload]:
        expires = now + timedelta(hours=hours)
        new = [Upload(owner=owner, length=1, expires_at=expires, **fields) for _ in range(number)]
        return Upload.objects.bulk_create(new)

    made(5, -1, used_at=now), made(2, -2)
    going_on, fresh = made(3, -3), made(1, 1)
    for upload in going_on:
        parts.Parts(upload.pk).create()

    assert uploads.uploads_delete_expired() == 7
    assert set(Upload.objects.all()) == {*going_on, *fresh}
    assert uploads.uploads_delete_expired() == 0


def aged(upload: str, kind: str) -> None:
    """Makes one of its files look older than a day."""
    path = Path(django_settings.FL_STAGING_DIR) / "uploads" / f"{upload}.{kind}"
    then = (timezone.now() - timedelta(hours=25)).timestamp()
    os.utime(path, (then, then))


def test_an_upload_that_is_deleted_while_it_is_sent_or_read_is_gone(ada, monkeypatch) -> None:
    def and_deleted(self: parts.Parts) -> int:
        size = self.size()
        self.delete()
        return size

    sent, asked = begin(ada), begin(ada, DATA + b" ")
    patch(ada, asked, DATA)
    monkeypatch.setattr(parts.Parts, "stop_others", and_deleted)

    answer = patch(ada, sent, DATA)

    assert (answer.status_code, answer.json()["code"]) == (404, "UPLOAD_GONE")
    upload = Upload.objects.get(pk=asked.split("/")[-2])
    parts.Parts(upload.pk).delete()
    with pytest.raises(NotFound, match="begin anew"):
        uploads.upload_finish(upload)


def test_tus_clients_learn_what_is_spoken_here(ada) -> None:
    answer = ada.options("/api/uploads/")

    assert answer.status_code == 204
    assert answer["Tus-Version"] == "1.0.0"
    assert answer["Tus-Extension"] == "creation,checksum,expiration,termination"
    assert int(answer["Tus-Max-Size"]) == django_settings.FL_MAX_MODEL_BYTES


def test_people_see_how_far_their_uploads_are(ada) -> None:
    url = begin(ada)
    patch(ada, url, DATA[:10])

    (listed,) = ada.get("/api/uploads/").json()

    assert (listed["offset"], listed["length"]) == (10, len(DATA))
    assert ada.get(url).json() == listed


def test_who_is_known_by_a_session_sends_files_too() -> None:
    client = Client(enforce_csrf_checks=True)
    client.force_login(person("ada", actor=True))
    client.cookies["csrftoken"] = "x" * 32
    data = save({"w": np.zeros(2**21, np.float32)})
    file = SimpleUploadedFile("model", data)

    form = {"name": "net", "description": "d", "model_file": file}
    answer = client.post("/api/models/", form, HTTP_X_CSRFTOKEN="x" * 32)

    assert len(data) > django_settings.DATA_UPLOAD_MAX_MEMORY_SIZE
    assert answer.status_code == 201, answer.content
