"""Uploads that end in the middle: nothing stays in staging, and nobody's log fills with tracebacks."""

import io
import logging
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings as django_settings
from django.core.handlers.wsgi import WSGIHandler
from django.core.signals import request_finished, request_started
from django.db import close_old_connections

from fl_server_core.services.tokens import token_issue
from tests.scenes import scene

pytestmark = pytest.mark.django_db
HEAD = (
    b'--B\r\nContent-Disposition: form-data; name="round"\r\n\r\n0\r\n'
    b'--B\r\nContent-Disposition: form-data; name="model_file"; filename="w"\r\n\r\n'
)


class Broken(io.BytesIO):
    """A connection that fails once what had arrived is read; without an error it just ends."""

    def __init__(self, data: bytes, error: Exception | None) -> None:
        super().__init__(data)
        self.error = error

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        whole = size is not None and 0 <= size <= len(data)
        if not whole and self.error is not None:
            raise self.error
        return data


@pytest.fixture(autouse=True)
def kept_connection() -> Any:
    """The test's transaction outlives its requests."""
    for signal in (request_started, request_finished):
        signal.disconnect(close_old_connections)
    yield
    for signal in (request_started, request_finished):
        signal.connect(close_old_connections)


def post(path: str, key: str, body: Broken, content_type: str) -> tuple[int, bytes]:
    """As a WSGI server hands it over."""
    status: list[int] = []
    environ = {
        "REQUEST_METHOD": "POST",
        "PATH_INFO": path,
        "SERVER_NAME": "localhost",
        "SERVER_PORT": "80",
        "CONTENT_TYPE": content_type,
        "CONTENT_LENGTH": str(20 * 2**20),
        "HTTP_AUTHORIZATION": f"Token {key}",
        "wsgi.input": body,
        "wsgi.url_scheme": "http",
        "wsgi.errors": io.StringIO(),
    }
    response: Any = WSGIHandler()(environ, lambda line, _: status.append(int(line.split()[0])))
    answer = b"".join(response)
    response.close()
    return status[0], answer


@pytest.mark.parametrize(
    "error", [ConnectionResetError("reset by peer"), TimeoutError("timed out"), None], ids=repr
)
@pytest.mark.parametrize("where", ["update", "admin"])
def test_a_broken_upload_leaves_nothing_in_staging(where: str, error, caplog) -> None:
    running = scene()
    path = f"/api/models/{running.training.model_id}/" if where == "update" else "/admin/login/"
    staging = Path(django_settings.FL_STAGING_DIR)
    before = set(staging.glob("*"))
    body = Broken(HEAD + b"z" * (3 * 2**20), error)

    with caplog.at_level(logging.ERROR):
        status, _ = post(
            path, token_issue(user=running.sites["ada"]), body, "multipart/form-data; boundary=B"
        )

    assert status in ({400, 415, 422} if where == "update" else {400, 403})
    assert set(staging.glob("*")) == before
    assert not caplog.records


def test_a_json_body_that_breaks_off_is_400() -> None:
    running = scene()
    body = Broken(b'{"clients": [', ConnectionResetError("reset by peer"))

    status, answer = post(
        "/api/trainings/", token_issue(user=running.actor), body, "application/json"
    )

    assert status == 400
    assert b"BODY_INTERRUPTED" in answer
