"""The id that an answer names finds the lines of its request in the log."""

import io
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from fl_server.settings import base
from fl_server_api.request_log import RequestFilter
from tests.api.conftest import Login
from tests.scenes import person

pytestmark = pytest.mark.django_db


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    """What the handler of our settings writes."""
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.addFilter(RequestFilter())
    handler.setFormatter(logging.Formatter(base.LOGGING["formatters"]["line"]["format"]))  # type: ignore[index]
    loggers = [logging.getLogger(name) for name in ("fl.server", "django")]
    for logger in loggers:
        logger.addHandler(handler)
    yield written
    for logger in loggers:
        logger.removeHandler(handler)


def broken(*_: Any, **__: Any) -> Any:
    logging.getLogger("fl.server").warning("half way")
    raise RuntimeError("a bug")


def test_each_line_of_a_request_has_its_id_and_user(
    login: Login, lines: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fl_server_api.views.tasks.task_wait", broken)

    answer = login(person("ada", client=True)).get("/api/tasks/")

    said = f"[{answer.json()['request_id']} ada] "
    assert f"fl.server {said}half way\n" in lines.getvalue()
    assert f"django.request {said}Internal Server Error: /api/tasks/\n" in lines.getvalue()


def test_a_line_outside_of_requests_has_none(login: Login, lines: io.StringIO) -> None:
    login(None).get("/api/nowhere/")

    logging.getLogger("fl.server").warning("a sweep")

    first, last = lines.getvalue().splitlines()
    assert " -] Not Found: /api/nowhere/" in first
    assert last.endswith("fl.server a sweep")


def test_a_host_that_is_not_served_is_one_line_that_names_the_setting(
    login: Login, lines: io.StringIO
) -> None:
    answer = login(None).get("/livez", HTTP_HOST="elsewhere.example\x1b[2J" + "x" * 1000)

    (line,) = lines.getvalue().splitlines()
    assert (answer.status_code, answer.json()["code"]) == (400, "INVALID_HOST")
    assert "FL_ALLOWED_HOSTS" in answer.json()["detail"]
    assert f"[{answer.json()['request_id']} -] refused" in line
    assert "'elsewhere.example\\x1b" in line
    assert "FL_ALLOWED_HOSTS" in line
    assert len(line) < 400
