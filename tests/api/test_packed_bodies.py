"""Bodies with a Content-Encoding: read like others, refused when they unpack to too much."""

import gzip
import importlib
from typing import Any

import pytest
from django.test.client import BOUNDARY, MULTIPART_CONTENT, encode_multipart
from safetensors.numpy import save

from fl_server_api import compression
from fl_server_core.models import LocalModel
from tests.api.test_updates import empty_staging, file
from tests.scenes import Scene, person, scene, weights

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


CODINGS = {"gzip": gzip.compress}
if module := compression.zstd_module():
    CODINGS["zstd"] = importlib.import_module(module).compress
packed = pytest.mark.parametrize("coding", CODINGS)


@packed
def test_a_packed_update_is_the_same_as_an_unpacked_one(login, coding: str) -> None:
    running = scene()

    first = send(login, running, CODINGS[coding](body(save(weights(1.0)))), coding)
    again = send(login, running, body(save(weights(1.0))), coding="identity")

    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json()["update_id"] == again.json()["update_id"]


@packed
def test_a_bomb_is_refused_before_it_is_on_the_disk(login, monkeypatch, coding: str) -> None:
    monkeypatch.setattr(compression, "FREE", 2**20)

    answer = send(login, scene(), CODINGS[coding](body(bytes(2**25))), coding)

    assert (answer.status_code, answer.json()["code"]) == (413, "COMPRESSION_RATIO")
    assert not LocalModel.objects.exists()


@pytest.mark.parametrize(
    "spoilt",
    [
        lambda data: data[:-20],
        lambda data: data + b"more",
        lambda data: data * 2,
        lambda data: b"no stream" + data,
    ],
    ids=["cut off", "more behind it", "twice", "no stream"],
)
@packed
def test_a_spoilt_stream_is_refused(login, spoilt, coding: str) -> None:
    answer = send(login, scene(), spoilt(CODINGS[coding](body(save(weights(1.0))))), coding)

    assert (answer.status_code, answer.json()["code"]) == (400, "BAD_CONTENT_ENCODING")
    assert not LocalModel.objects.exists()


@packed
@pytest.mark.parametrize("data", [b"", b"no stream"], ids=["nothing", "no stream"])
def test_who_is_refused_before_the_body_is_read_gets_that_answer(login, data, coding) -> None:
    running = scene()
    stranger = login(person("stranger"))

    answer = stranger.generic(
        "POST",
        f"/api/models/{running.training.model_id}/",
        data,
        content_type=MULTIPART_CONTENT,
        HTTP_CONTENT_ENCODING=coding,
    )

    assert (answer.status_code, answer.json()["code"]) == (404, "NOT_FOUND")


@pytest.mark.parametrize("coding", ["br", "gzip, gzip", "zstd, gzip", "deflate"])
def test_other_codings_are_refused_and_those_that_are_read_are_named(login, coding: str) -> None:
    answer = send(login, scene(), b"whatever", coding)

    assert (answer.status_code, answer.json()["code"]) == (415, "UNKNOWN_CONTENT_ENCODING")
    assert answer.json()["accepted"] == list(CODINGS)
    assert answer.headers["Accept-Encoding"] == ", ".join(CODINGS)


def test_where_zstd_is_not_installed_it_is_refused(login, monkeypatch) -> None:
    monkeypatch.setattr(compression, "CODINGS", {"gzip": compression.Gzip})

    answer = send(login, scene(), b"whatever", "zstd")

    assert (answer.status_code, answer.json()["accepted"]) == (415, ["gzip"])


@pytest.mark.skipif("zstd" not in CODINGS, reason="the extra zstd is not installed")
def test_a_window_beyond_8_mib_is_refused_before_there_is_memory_for_it(login) -> None:
    zstd = importlib.import_module(compression.zstd_module())
    wide = {zstd.CompressionParameter.window_log: 27, zstd.CompressionParameter.checksum_flag: 1}
    stream = zstd.ZstdCompressor(options=wide)
    data = stream.compress(body(save(weights(1.0))) + bytes(2**24)) + stream.flush()

    answer = send(login, scene(), data, "zstd")

    assert (answer.status_code, answer.json()["code"]) == (400, "BAD_CONTENT_ENCODING")


def test_answers_are_never_packed(login) -> None:
    running = scene()

    answer = login(running.sites["ada"]).get(
        f"/api/models/{running.training.model_id}/", HTTP_ACCEPT_ENCODING="gzip, zstd, br"
    )

    assert answer.status_code == 200
    assert "Content-Encoding" not in answer.headers
    assert int(answer.headers["Content-Length"]) == len(b"".join(answer.streaming_content))
