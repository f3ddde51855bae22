"""Bodies with Content-Encoding gzip: read like others, refused when they unpack to too much."""

import gzip
from typing import Any

import pytest
from django.test.client import BOUNDARY, MULTIPART_CONTENT, encode_multipart
from safetensors.numpy import save

from fl_server_api import compression
from fl_server_core.models import LocalModel
from tests.api.test_updates import empty_staging, file
from tests.scenes import Scene, scene, weights

pytestmark = pytest.mark.django_db
__all__ = ["empty_staging"]


def body(data: bytes) -> bytes:
    fields = {"round": 0, "sample_size": 2, "model_file": file(data)}
    packed: bytes = encode_multipart(BOUNDARY, fields)
    return packed


def send(login, running: Scene, data: bytes, coding: str = "gzip") -> Any:
    return login(running.sites["ada"]).generic(
        "POST",
        f"/api/models/{running.training.model_id}/",
        data,
        content_type=MULTIPART_CONTENT,
        HTTP_CONTENT_ENCODING=coding,
    )


def test_a_packed_update_is_the_same_as_an_unpacked_one(login) -> None:
    running = scene()

    first = send(login, running, gzip.compress(body(save(weights(1.0)))))
    again = send(login, running, body(save(weights(1.0))), coding="identity")

    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json()["update_id"] == again.json()["update_id"]


def test_a_bomb_is_refused_before_it_is_on_the_disk(login, monkeypatch) -> None:
    monkeypatch.setattr(compression, "FREE", 2**20)

    answer = send(login, scene(), gzip.compress(body(bytes(2**25))))

    assert (answer.status_code, answer.json()["code"]) == (413, "COMPRESSION_RATIO")
    assert not LocalModel.objects.exists()


@pytest.mark.parametrize(
    "spoilt",
    [lambda data: data[:-20], lambda data: data + b"more", lambda data: b"no gzip" + data],
    ids=["cut off", "more behind it", "no gzip"],
)
def test_a_spoilt_stream_is_refused(login, spoilt) -> None:
    answer = send(login, scene(), spoilt(gzip.compress(body(save(weights(1.0))))))

    assert (answer.status_code, answer.json()["code"]) == (400, "BAD_CONTENT_ENCODING")
    assert not LocalModel.objects.exists()


@pytest.mark.parametrize("coding", ["br", "gzip, gzip", "zstd"])
def test_other_codings_are_refused(login, coding: str) -> None:
    answer = send(login, scene(), b"whatever", coding)

    assert (answer.status_code, answer.json()["code"]) == (415, "UNKNOWN_CONTENT_ENCODING")
