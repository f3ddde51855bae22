"""Nothing that a client can send is a 500, and every refusal has a code and a request id."""

import contextlib
import json
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from django.db import InterfaceError, OperationalError
from django.test import Client

from fl_server_api.errors import STATUS, csrf_failure, handle
from fl_server_api.parsers import DEPTH
from fl_server_core import exceptions
from fl_server_core.services.tokens import token_issue
from tests.scenes import person, scene

pytestmark = pytest.mark.django_db
IDS = ["x", "0", "-1", "%00", "9" * 5000, "é", "00000000-0000-0000-0000-000000000000", "..%2f"]
OBJECTS = ["users", "groups", "models", "trainings", "users/myself/tokens"]
BODIES = {
    "nothing": b"",
    "cut": b'{"model_id":',
    "not UTF-8": b'{"a": "\xff"}',
    "NaN": b'{"options": {"client_config": {"a": NaN}}}',
    "infinite": b'{"options": {"client_config": {"a": 1e999}}}',
    "nested": b"[" * 100_000,
    "half a surrogate": b'{"name": "\\ud800"}',
    "NUL": b'{"name": "\\u0000", "username": "\\u0000", "label": "\\u0000"}',
    "a list": b"[]",
    "a number": b"7",
    "a string": b'"x"',
    "null": b"null",
    "a huge number": b'{"days": 1' + b"0" * 4000 + b', "target_num_updates": 1' + b"0" * 400 + b"}",
}
POSTS = [
    "users/", "groups/", "trainings/", "models/", "users/myself/tokens/", "inference/",
    "models/{model}/", "models/{model}/metrics/", "models/{model}/preprocessing/",
    "trainings/{training}/start/", "tasks/{task}/progress/", "tasks/{task}/failure/",
    "tasks/{task}/result/",
]  # fmt: skip


@pytest.mark.parametrize("kind", OBJECTS)
@pytest.mark.parametrize("pk", IDS, ids=lambda pk: pk[:12])
def test_a_malformed_id_is_not_found(login, kind: str, pk: str) -> None:
    client = login(person("ada", actor=True))

    for method in (client.get, client.delete):
        response = method(f"/api/{kind}/{pk}/")

        assert response.status_code in {404, 405}
        assert response.json()["code"] in {"NOT_FOUND", "METHOD_NOT_ALLOWED"}


@pytest.mark.parametrize("what", BODIES)
@pytest.mark.parametrize("path", POSTS)
def test_a_body_that_makes_no_sense_is_refused(login, settings, what: str, path: str) -> None:
    settings.FL_OPEN_REGISTRATION = True
    running = scene()
    url = "/api/" + path.format(
        model=running.training.model_id, training=running.training.pk, task=running.task("ada").pk
    )

    response = login(running.sites["ada"]).post(
        url, data=BODIES[what], content_type="application/json"
    )

    assert response.status_code < 500, response.content
    if response.status_code >= 400:
        assert response.json()["code"]
        assert response.json()["request_id"] == response["X-Request-ID"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"[" * 100_000 + b"]" * 100_000, "nested too deeply; 500 levels"),
        (b'{"name": "\\ud800"}', "\\ud800 is half a surrogate pair"),
        (b'{"name": NaN}', "NaN is no JSON"),
        (b'{"name": 1', "Expecting"),
        (b" " * (4 * 2**20 + 1), "as a file of a form"),
    ],
    ids=["nested", "surrogate", "NaN", "cut", "large"],
)
def test_a_body_that_can_not_be_read_is_told_what_is_wrong_with_it(
    login, body: bytes, said: str
) -> None:
    client = login(person("ada", actor=True))

    refused = client.post("/api/trainings/", data=body, content_type="application/json")

    assert refused.status_code in {400, 413}
    assert said in refused.json()["detail"]


def test_as_many_levels_as_are_promised_are_read(login) -> None:
    body = b'{"model_id": ' + b"[" * (DEPTH - 1) + b"]" * (DEPTH - 1) + b"}"

    refused = login(person("ada", actor=True)).post(
        "/api/trainings/", data=body, content_type="application/json"
    )

    assert refused.json()["code"] == "INVALID"
    assert "nested" not in refused.json()["detail"]


def test_who_comes_without_a_token_is_told_how_to_bring_one(login) -> None:
    refused = login(None).get("/api/trainings/")

    assert (refused.status_code, refused.json()["code"]) == (401, "NOT_AUTHENTICATED")
    assert "Authorization: Token <key>" in refused.json()["detail"]
    assert refused["WWW-Authenticate"] == "Token"


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-python-pickle", "a/b;c", ""])
def test_an_unknown_content_type_is_415(login, content_type: str) -> None:
    response = login(person("ada", actor=True)).generic(
        "POST", "/api/trainings/", data=b"x", content_type=content_type
    )

    assert response.status_code in {400, 415}
    assert response.json()["code"]


def test_an_address_without_a_route_answers_json(login) -> None:
    response = login(None).get("/api/no/such/thing/")

    assert (response.status_code, response.json()["code"]) == (404, "NOT_FOUND")


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/api/trainings", "/api/trainings/"),
        ("/api/v1/models", "/api/v1/models/"),
        ("/users/", "/api/users/"),
        ("/tasks", "/api/tasks/"),
        ("/api/no/such/thing", None),
        ("/api/trainigs/", None),
    ],
)
def test_a_post_to_a_mistyped_address_is_told_the_right_one(path: str, meant: str | None) -> None:
    browser = Client(enforce_csrf_checks=True)

    response = browser.post(path, {"a": 1}, content_type="application/json")

    assert (response.status_code, response.json()["code"]) == (404, "NOT_FOUND")
    assert response.json()["detail"].partition("; ")[2] == (
        f"did you mean {meant}?" if meant else "GET /api/ lists what there is"
    )


@pytest.mark.parametrize("kind", ["json", "x-www-form-urlencoded"])
def test_a_session_without_its_csrf_header_is_told_so_as_json(kind: str) -> None:
    browser = Client(enforce_csrf_checks=True)
    browser.force_login(person("ada", actor=True))
    browser.cookies["csrftoken"] = "x" * 32
    body = f"csrfmiddlewaretoken={'x' * 32}"  # where Django, too, would look in a form

    response = browser.post("/api/trainings/", body, content_type=f"application/{kind}")

    assert (response.status_code, response.json()["code"]) == (403, "CSRF")
    assert "X-CSRFToken" in response.json()["detail"]


def test_what_django_itself_refuses_for_csrf_is_json_below_the_api_and_a_page_elsewhere(rf) -> None:
    below, elsewhere = (csrf_failure(rf.post(path), "reason") for path in ("/api/x/", "/admin/"))

    assert (below.status_code, json.loads(below.content)["code"]) == (403, "CSRF")
    assert (elsewhere.status_code, elsewhere["Content-Type"][:9]) == (403, "text/html")


@pytest.mark.parametrize("path", ["/api/", "/api/v1/"])
def test_the_index_names_addresses_that_are_there(login, path: str) -> None:
    client = login(person("ada", actor=True))

    found = login(None).get(path).json()

    assert {"schema", "swagger-ui", "redoc", "users", "models", "trainings", "tasks"} < set(found)
    for address in found.values():
        assert address.startswith(f"http://testserver{path}")
        assert client.get(address).status_code == 200


def test_the_description_of_the_api_loads_nothing_from_elsewhere(client) -> None:
    for page in ("swagger-ui", "redoc"):
        html = client.get(f"/api/schema/{page}/").content.decode()

        assert "<script" in html
        assert "https:" not in html


def test_a_sane_request_id_is_kept_and_another_replaced(login) -> None:
    client = login(None)

    assert client.get("/livez", HTTP_X_REQUEST_ID="abc-12345")["X-Request-ID"] == "abc-12345"
    assert client.get("/livez", HTTP_X_REQUEST_ID="a\r\nb<>")["X-Request-ID"] != "a\r\nb<>"


def test_an_old_protocol_is_told_to_update(login) -> None:
    response = login(person("ada")).get("/api/tasks/", HTTP_X_FL_PROTOCOL="0")

    assert (response.status_code, response.json()["code"]) == (426, "UPGRADE_REQUIRED")


def every_refusal() -> list[type[exceptions.DomainError]]:
    found, todo = [], [exceptions.DomainError]
    while todo:
        kind = todo.pop()
        found += kind.__subclasses__()
        todo += kind.__subclasses__()
    return found


def test_every_refusal_has_a_status_and_a_code_of_its_kind() -> None:
    from fl_server_core.services.tokens import BadToken

    for kind in every_refusal():
        assert kind.code.isupper()
        if kind is not BadToken:  # becomes DRF's own 401
            assert any(issubclass(kind, base) for base in STATUS), kind


def test_livez_and_readyz(client) -> None:
    assert client.get("/livez").json() == {"status": "ok"}
    assert client.get("/readyz").json()["status"] == "ok"


@pytest.mark.parametrize(
    "header",
    ["Token", "Token x", "Token a b", "Basic !!!", "Basic " + "A" * 9000, "Basic AAA=", "Bearer x"],
)
def test_bad_credentials_are_401_with_the_way_to_log_in(login, header: str) -> None:
    client = login(None)
    client.credentials(HTTP_AUTHORIZATION=header)

    response = client.get("/api/users/myself/")

    assert response.status_code == 401
    assert response["WWW-Authenticate"]
    assert response.json()["code"]


def test_a_bearer_token_is_told_the_word_that_is_used_here(login) -> None:
    client = login(None)
    client.credentials(HTTP_AUTHORIZATION=f"Bearer {token_issue(user=person('ada'))}")

    response = client.get("/api/users/myself/")

    assert (response.status_code, response.json()["code"]) == (401, "BAD_TOKEN")
    assert "Authorization: Token <key>" in response.json()["detail"]


def test_the_web_process_does_not_load_torch() -> None:
    code = (
        "import os, sys; os.environ['DJANGO_SETTINGS_MODULE'] = 'fl_server.settings.test'\n"
        "import django; django.setup()\n"
        "import fl_server.urls, fl_server.wsgi\n"
        "from fl_server_ai.aggregation import STRATEGIES; list(STRATEGIES)\n"
        "assert not {'torch', 'PIL'} & set(sys.modules)"
    )

    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_way_to_log_in_works(login) -> None:
    import base64

    ada = person("ada")
    ada.set_password("a long pass phrase")
    ada.save()
    key = token_issue(user=ada)
    for text in (
        f"Token {key}",
        "Basic " + base64.b64encode(f"{key}:".encode()).decode(),
        "Basic " + base64.b64encode(b"ada:a long pass phrase").decode(),
    ):
        client = login(None)
        client.credentials(HTTP_AUTHORIZATION=text)
        assert client.get("/api/users/myself/").json()["username"] == "ada"
    session = login(None)
    session.force_login(ada)
    assert session.get("/api/users/myself/").status_code == 200


@pytest.mark.parametrize("kind", [OperationalError, InterfaceError])
def test_a_database_that_is_away_is_said_to_be_away(kind: type[Exception]) -> None:
    answer = handle(kind("server closed the connection unexpectedly"), {})

    assert answer is not None
    assert (answer.status_code, answer.data["code"]) == (503, "DATABASE_AWAY")
    assert answer.headers["Retry-After"] == "2"
    assert "connection" not in answer.data["detail"]


class DiskFull(Exception):
    """What PostgreSQL's driver raises: the server alone can set its code."""

    pgcode = "53100"


def full_sqlite() -> Exception:
    database = sqlite3.connect(":memory:")
    database.execute("create table t (x)")
    database.execute("pragma max_page_count = 2")
    with contextlib.closing(database), pytest.raises(sqlite3.OperationalError) as full:
        database.execute("insert into t values (zeroblob(100000))")
    return full.value


@pytest.mark.parametrize("cause", [DiskFull(), full_sqlite()], ids=["PostgreSQL", "SQLite"])
def test_a_database_without_room_is_not_said_to_be_away(cause: Exception) -> None:
    error = OperationalError("no room")
    error.__cause__ = cause

    answer = handle(error, {})

    assert answer is not None
    assert (answer.status_code, answer.data["code"]) == (507, "OUT_OF_SPACE")


def test_a_full_disk_is_said_to_be_full_wherever_it_shows() -> None:
    with (
        Path("/dev/full").open("wb", buffering=0) as disk,
        pytest.raises(OSError, match="space") as full,
    ):
        disk.write(b"x")

    answer = handle(full.value, {})

    assert answer is not None
    assert (answer.status_code, answer.data["code"]) == (507, "OUT_OF_SPACE")
