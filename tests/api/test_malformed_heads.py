"""A head that Django or DRF can't read is refused with a code, or passes for one without that field; never a 500."""

import json
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import pytest
from django.core.signals import request_finished, request_started
from django.db import close_old_connections

from fl_server.front.answers import asked
from fl_server.front.environ import environ_of
from fl_server.wsgi import application

pytestmark = pytest.mark.django_db
FORM = b'--x\r\nContent-Disposition: form-data; name="username"\r\n\r\n\xff\r\n--x--\r\n'


def told(line: str, body: bytes = b"", **headers: str) -> tuple[int, dict[str, str], bytes]:
    """What the whole application says, of which the tests' clients leave the first step out."""
    method, _, url = line.partition(" ")
    path, _, query = url.partition("?")
    fields = {"host": "localhost", **{n.replace("_", "-"): v for n, v in headers.items()}}
    scope = {
        "method": method, "raw_path": path.encode(), "query_string": query.encode(),
        "http_version": "1.1", "scheme": "http",
        "headers": [(name.encode(), value.encode("latin-1")) for name, value in fields.items()],
    }  # fmt: skip
    answer = asked(application, environ_of(scope, BytesIO(body), len(body)))
    return answer.status, {n.decode().lower(): v.decode() for n, v in answer.headers}, answer.body


@pytest.fixture(autouse=True)
def connections() -> Iterator[None]:
    """Stay open, as the tests' clients leave them."""
    for signal in (request_started, request_finished):
        signal.disconnect(close_old_connections)
    yield
    for signal in (request_started, request_finished):
        signal.connect(close_old_connections)


@pytest.mark.parametrize(
    "kind",
    ["a; charset*=nonsense''x", "a; b*=idna''%ff", f"a; b*{'9' * 5000}*=c"],
    ids=["an unknown encoding", "text that is none of its encoding", "a number without end"],
)
@pytest.mark.parametrize("line", ["GET /livez", "POST /api/users/", "GET /nowhere?a=b"])
def test_a_content_type_that_can_not_be_read_is_refused(line: str, kind: str) -> None:
    status, headers, body = told(line, b"{}", content_type=kind)

    assert (status, json.loads(body)["code"]) == (400, "BAD_HEADER")
    assert json.loads(body)["request_id"] == headers["x-request-id"]


@pytest.mark.parametrize("charset", ["hex", "idna", "undefined", "no-such-thing"])
def test_a_charset_that_is_no_text_is_ignored(charset: str) -> None:
    kind = f"multipart/form-data; boundary=x; charset={charset}"
    cookie = f"csrftoken={'x' * 32}"

    assert told("GET /livez?a=%FF", content_type=kind)[0] == 200
    assert told("POST /admin/login/", FORM, content_type=kind, cookie=cookie)[0] == 403


def test_a_query_with_too_many_fields_is_read_by_nobody_too_early() -> None:
    kind = "application/json; charset=utf-8"

    assert told("GET /livez?" + "a&" * 2000, content_type=kind)[0] == 200


@pytest.mark.parametrize(
    "cookie",
    [
        'sessionid="aaaaaaaaaa\\000"',
        'csrftoken="aaaaaaaaaa\\000"; messages="a\\000"',
        "sessionid=\xe9",
        "sessionid=" + "a" * 5000,
    ],
    ids=["a NUL", "a NUL elsewhere", "an accent", "no end"],
)
def test_a_cookie_that_is_none_of_ours_is_one_that_is_not_there(login: Any, cookie: str) -> None:
    answers = [
        login(None).get(path, HTTP_COOKIE=cookie) for path in ("/api/users/myself/", "/admin/")
    ]

    assert [answer.status_code for answer in answers] == [401, 302]
