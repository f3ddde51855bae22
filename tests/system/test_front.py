"""The server's front over real sockets: who waits, is slow or sends too much takes nothing from others."""

import asyncio
import contextlib
import http.client
import json
import select
import socket
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pytest
from django.conf import settings as django_settings
from django.core.files.uploadedfile import SimpleUploadedFile
from django.test.client import Client, encode_multipart
from safetensors.numpy import save

from fl_server.embedded.web import Web
from fl_server.front import protocol
from fl_server.front.app import SLOW, Front
from fl_server.front.pace import Pace
from fl_server.front.upload import AHEAD, BLOCK, PIECE, Upload
from fl_server_ai.notifications import wakeups
from fl_server_ai.services import updates, watching
from fl_server_ai.services.places import EACH, POLLS
from fl_server_ai.services.trainings import training_start
from fl_server_api.answer_points import SENT
from fl_server_api.requests import wsgi_application
from fl_server_api.views import results
from fl_server_core.models import User
from fl_server_core.services.tokens import token_issue
from fl_server_core.services.uploads import upload_append, upload_create
from tests.lines import ENOUGH, Line, Told
from tests.scenes import person, scene, weights
from tests.system.processes import until

pytestmark = [pytest.mark.system, pytest.mark.django_db(transaction=True)]
THREADS, TRANSFERS = 2, 4


@dataclass
class Served:
    """The real server in a thread of this process, with as few threads as show what matters."""

    web: Web
    lines: list[Line] = field(default_factory=list)

    @property
    def front(self) -> Front:
        front: Front = self.web.front
        return front

    def line(self, token: str = "") -> Line:
        self.lines.append(Line(self.web.port, token))
        return self.lines[-1]

    def get(self, path: str, token: str = "", **headers: str) -> Told:
        with self.line(token) as line:
            line.ask("GET", path, **headers)
            return line.told()


@pytest.fixture
def served(settings: Any) -> Iterator[Served]:
    settings.FL_TRANSFER_THREADS = TRANSFERS
    settings.FL_POLL_SECONDS = 60
    web = Web(("127.0.0.1", 0), wsgi_application(), threads=THREADS, tls=None)
    web.open()
    server = Served(web)
    yield server
    for line in server.lines:
        line.close()
    web.close()


def waiting(served: Served, count: int) -> None:
    until(lambda: len(served.front.waiting) == count, f"{count} waiting polls", ENOUGH)


def polls(served: Served, tokens: list[str], each: int = 1) -> list[Line]:
    lines = [served.line(token) for token in tokens for _ in range(each)]
    for line in lines:
        line.ask("GET", "/api/tasks/?wait=60")
    return lines


def threads() -> int:
    return sum(t.name.startswith(("control", "transfer")) for t in threading.enumerate())


# --- long-polls -------------------------------------------------------------------------------


def test_two_hundred_polls_wait_on_two_threads_and_all_hear_of_their_task(served: Served) -> None:
    told = scene(*(f"site-{number}" for number in range(50)), started=False)
    lines = polls(served, [token_issue(user=user) for user in told.sites.values()], EACH)
    waiting(served, 200)

    assert threads() <= THREADS
    assert served.get("/livez").status == 200
    training_start(training=told.training, user=told.actor)
    answers = [line.told() for line in lines]

    assert {(answer.status, answer.json["state"]) for answer in answers} == {(200, "task")}
    assert served.front.waiting == set()
    assert POLLS.take("somebody")
    POLLS.give_back("somebody")
    assert POLLS.taken() == 0
    assert wakeups._listeners == {}
    for line in lines:
        line.close()


def test_one_user_has_four_places_and_a_poll_that_hangs_up_gives_its_own_back(
    served: Served,
) -> None:
    token = token_issue(user=person("ada", client=True))
    lines = polls(served, [token], EACH)
    waiting(served, EACH)

    with served.line(token) as fifth:
        fifth.ask("GET", "/api/v1/tasks/?wait=60")
        assert fifth.told().json["retry_after"] == 2.0
    lines.pop().close()
    waiting(served, EACH - 1)

    lines += polls(served, [token])
    waiting(served, EACH)
    for line in lines:
        line.close()
    waiting(served, 0)


def test_who_hangs_up_before_his_turn_costs_nothing(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(served.front, "ask", lambda environ: asked.append(environ["PATH_INFO"]))
    monkeypatch.setattr(served.front, "asking", turn := asyncio.Semaphore(0))
    lines = polls(served, [token_issue(user=person("ada", client=True))], 3)
    until(lambda: len(turn._waiters or ()) == len(lines), "three polls")

    state = served.web._server.server_state
    loop = next(iter(state.connections)).loop

    for line in lines:
        line.close()
    until(lambda: not state.connections, "the end of the connections")
    loop.call_soon_threadsafe(turn.release)
    until(lambda: not state.tasks, "the end of the polls")

    assert asked == []


def test_a_token_that_is_revoked_is_refused_at_the_next_wake_up(served: Served) -> None:
    user = person("ada", client=True)
    [line] = polls(served, [token_issue(user=user)])
    waiting(served, 1)

    user.api_tokens.all().delete()
    wakeups.wake([str(user.pk)])

    assert line.told().status == 401
    line.close()


def test_a_poll_is_not_for_headers_to_fake_and_ends_when_its_time_is_over(served: Served) -> None:
    token = token_issue(user=person("ada", client=True))

    answer = served.get("/api/tasks/?wait=0.2", token, **{"fl.poll": "x", "fl.transfer": "y"})

    assert (answer.status, answer.json["state"]) == (200, "wait")
    assert served.get("/api/tasks/?wait=nan", token).json["code"] == "BAD_WAIT"
    assert served.get("/api/tasks/?wait=60").status == 401


def test_a_server_that_stops_answers_its_polls_and_ends_its_streams(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "LOOK_SECONDS", ENOUGH)
    told = scene("ada", started=False)
    [line] = polls(served, [token_issue(user=told.sites["ada"])])
    watcher = served.line(token_issue(user=told.actor))
    watcher.ask("GET", f"/api/trainings/{told.training.pk}/events/")
    waiting(served, 1)
    until(lambda: wakeups._waiting == 2, "the poll and the stream")

    served.web.close()

    assert not served.web._thread.is_alive()
    answer, events = line.told(), watcher.told()
    assert (answer.status, answer.json["state"]) == (200, "wait")
    assert answer.headers["connection"] == "close"
    assert events.body.endswith(b"}\n\n")
    assert line.ended()
    assert watcher.ended()


# --- slow clients -----------------------------------------------------------------------------


def test_heads_and_bodies_that_come_byte_by_byte_stop_nobody_and_are_ended(
    served: Served, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.FL_STALLED_SECONDS = 1
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 1.0)
    lines = [served.line() for _ in range(60)]
    for number, line in enumerate(lines):
        if number % 3 == 0:
            line.say(b"GET /livez HTTP/1.1\r\nHost: loc")
        elif number % 3 == 1:
            line.ask("POST", "/api/users/", b'{"user', Content_Length="1000")
        # the others don't even begin

    assert served.get("/livez").status == 200
    assert threads() <= THREADS
    answers = [line.told() for line in lines]

    assert {(answer.status, answer.json["code"]) for answer in answers} == {(408, "TOO_SLOW")}
    assert all(line.ended() for line in lines)
    for line in lines:
        line.close()


def test_a_connection_that_is_kept_is_left_alone_between_two_requests(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.1)

    with served.line() as line:
        line.ask("GET", "/livez")
        assert line.told().status == 200
        assert select.select([line.socket], [], [], 0.4)[0] == []
        line.ask("GET", "/livez")
        assert line.told().status == 200


def test_slow_uploads_take_a_quarter_of_their_own_threads_and_none_of_the_others(
    served: Served, settings: Any
) -> None:
    settings.FL_STALLED_SECONDS = 2
    ada, grace = (token_issue(user=person(name, actor=True)) for name in ("ada", "grace"))
    form = {"Content_Type": "multipart/form-data; boundary=B", "Content_Length": "9000000"}
    first, second = served.line(ada), served.line(ada)

    first.ask("POST", "/api/models/", b"--B\r\n", **form)
    until(lambda: served.front.bodies.taken() == 1, "the first upload")
    second.ask("POST", "/api/models/", b"--B\r\n", **form, Expect="100-continue")

    refused = second.told()
    assert (refused.status, refused.json["code"]) == (429, "THROTTLED")
    assert refused.headers["retry-after"] == "5"
    assert served.get("/livez").status == 200
    with served.line(grace) as other:
        body = b'--B\r\nContent-Disposition: form-data; name="name"\r\n\r\n' + b"n" * 100_000
        body += b"\r\n--B--\r\n"
        other.ask("POST", "/api/models/", body, **{**form, "Content_Length": str(len(body))})
        assert other.told().status == 400
    slow = first.told()
    assert (slow.status, slow.json["code"]) == (408, "TOO_SLOW")
    assert first.ended()
    until(lambda: served.front.bodies.taken() == 0, "the end of the first upload")
    first.close()
    second.close()


def test_updates_that_wait_for_their_turn_leave_threads_for_everybody_else(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = scene(*(f"site-{number}" for number in range(THREADS + 1)))
    turns, arrived = threading.Semaphore(0), threading.Semaphore(0)

    @contextlib.contextmanager
    def turn() -> Iterator[None]:
        arrived.release()
        assert turns.acquire(timeout=ENOUGH)
        yield

    monkeypatch.setattr(updates, "_turn", turn)
    fields = {"meta": json.dumps({"num_examples": 1})}
    lines = []
    for name, site in told.sites.items():
        file = SimpleUploadedFile("update", save(weights(1.0)))
        form = encode_multipart("B", {**fields, "model_file": file})
        lines.append(served.line(token_issue(user=site)))
        how = {"Content_Type": "multipart/form-data; boundary=B", "Content_Length": len(form)}
        lines[-1].ask("POST", f"/api/tasks/{told.task(name).pk}/result/", form, **how)
    for _ in range(THREADS):
        assert arrived.acquire(timeout=ENOUGH)

    status = served.get("/livez").status
    for _ in lines:
        turns.release()

    assert status == 200
    assert {line.told().status for line in lines} == {201}


def test_updates_that_are_here_already_leave_threads_for_downloads(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = scene(*(f"site-{number}" for number in range(TRANSFERS)))
    turns = threading.Semaphore(0)

    @contextlib.contextmanager
    def turn() -> Iterator[None]:
        assert turns.acquire(timeout=ENOUGH)
        yield

    monkeypatch.setattr(updates, "_turn", turn)
    data = save(weights(1.0))
    lines = []
    for name, site in told.sites.items():
        upload = upload_create(owner=site, length=len(data))
        upload_append(upload, offset=0, blocks=[data], checksum=None)
        fields = {"meta": json.dumps({"num_examples": 1}), "upload": str(upload.pk)}
        form = encode_multipart("B", fields)
        how = {"Content_Type": "multipart/form-data; boundary=B", "Content_Length": len(form)}
        lines.append(served.line(token_issue(user=site)))
        lines[-1].ask("POST", f"/api/tasks/{told.task(name).pk}/result/", form, **how)

    sockets = [line.socket for line in lines]
    until(lambda: len(select.select(sockets, [], [], 0)[0]) == TRANSFERS // 2, "those too many")
    download = served.get(f"/api/models/{told.training.model_id}/", token_issue(user=told.actor))
    for _ in lines:
        turns.release()
    statuses = sorted(line.told().status for line in lines)

    assert download.status == 200
    assert statuses == [201] * (TRANSFERS // 2) + [503] * (TRANSFERS // 2)


@pytest.mark.parametrize(
    ("asked", "slow"),
    [
        ("POST /api/models/", True),  # of an upload that is complete: all of it is read
        ("GET /api/models/", False),
        ("PATCH /api/uploads/6/", True),  # the last piece, after which the digest is computed
        ("HEAD /api/v1/uploads/6/", False),
        ("POST /api/v1/tasks/6/result/", True),
        ("POST /api/tasks/6/progress/", False),
    ],
)
def test_small_requests_that_read_large_files_are_known(asked: str, slow: bool) -> None:
    assert bool(SLOW.fullmatch(asked)) == slow


def test_bodies_of_strangers_share_a_quarter_too(served: Served, settings: Any) -> None:
    settings.FL_OPEN_REGISTRATION = True
    form = {"Content_Type": "application/json", "Content_Length": "100000"}
    first, second = served.line(), served.line()

    first.ask("POST", "/api/users/", b"{", **form)
    until(lambda: served.front.bodies.taken() == 1, "the first body")
    second.ask("POST", "/api/users/", b"{", **form, Expect="100-continue")

    refused = second.told()
    assert (refused.status, refused.json["code"]) == (503, "TOO_MANY_BODIES")
    assert refused.headers["retry-after"] == "5"


def test_who_hangs_up_in_the_middle_of_an_upload_leaves_its_place(served: Served) -> None:
    token = token_issue(user=person("ada", actor=True))

    for _ in range(2):
        line = served.line(token)
        form = {"Content_Type": "multipart/form-data; boundary=B", "Content_Length": "9000000"}
        line.ask("POST", "/api/models/", b"--B\r\n" + b"x" * 100_000, **form)
        until(lambda: served.front.bodies.taken() == 1, "the upload")
        line.close()
        until(lambda: served.front.bodies.taken() == 0, "its end")


# --- too much ---------------------------------------------------------------------------------


def test_a_body_over_the_limit_is_refused_before_it_is_read(served: Served, settings: Any) -> None:
    settings.FL_MAX_MODEL_BYTES = 2**20
    token = token_issue(user=person("ada", actor=True))

    with served.line(token) as line:
        line.ask("POST", "/api/models/", Content_Length=str(10**12), Expect="100-continue")
        patient = line.told()
        assert line.ended()
    with served.line(token) as line:
        line.ask("POST", "/api/models/", b"z" * 5 * 2**20, Content_Length=str(5 * 2**20))
        hasty = line.told()
        line.ask("GET", "/livez")
        after = line.told()

    assert [(told.status, told.json["code"]) for told in (patient, hasty)] == [
        (413, "TOO_LARGE")
    ] * 2
    assert "connection" not in hasty.headers
    assert after.status == 200


def test_strangers_are_refused_before_their_body_is_read(served: Served) -> None:
    with served.line() as line:
        line.ask("POST", "/api/models/", Content_Length=str(10**8), Expect="100-continue")

        assert line.told().status == 401
        assert line.ended()


def test_who_is_known_by_a_session_is_refused_before_his_body_is_read_too(
    served: Served, settings: Any
) -> None:
    settings.FL_STALLED_SECONDS = 2  # a body that is asked for does not come
    settings.CACHES = {"default": {"BACKEND": "django.core.cache.backends.locmem.LocMemCache"}}
    settings.FL_RATE_UPLOADS = (3, 86_400)
    told = scene("ada")
    user = person("eve", actor=True, is_staff=True, storage_bytes=9)
    browser = Client()
    browser.force_login(user)
    session = browser.cookies[django_settings.SESSION_COOKIE_NAME].value
    head = {
        "Cookie": f"sessionid={session}; csrftoken={'x' * 32}",
        "X_CSRFToken": "x" * 32,
        "Content_Type": "multipart/form-data; boundary=B",
        "Expect": "100-continue",
    }

    def refused(path: str, size: int, **headers: str) -> tuple[int, str]:
        with served.line() as line:
            line.ask("POST", path, **{**head, "Content_Length": str(size), **headers})
            answer = line.told()
            return answer.status, answer.json["code"]

    assert refused("/api/models/", 10**12) == (413, "TOO_LARGE")
    assert refused("/api/models/", 10**6) == (409, "STORAGE_QUOTA")
    assert refused(f"/api/models/{told.training.model_id}/", 10**6) == (404, "NOT_FOUND")
    assert refused("/api/models/", 10**6, X_CSRFToken="y" * 32) == (403, "CSRF")
    assert refused("/api/models/", 10**6) == (409, "STORAGE_QUOTA")
    assert refused("/api/models/", 10**6) == (429, "THROTTLED")


def test_nobody_sends_more_files_to_a_page_than_may_be_kept(served: Served, settings: Any) -> None:
    settings.FL_STALLED_SECONDS = 2
    browser = Client()
    browser.force_login(person("eve", is_staff=True))
    session = browser.cookies[django_settings.SESSION_COOKIE_NAME].value
    how = {"Content_Type": "multipart/form-data; boundary=B", "Content_Length": str(10**12)}

    with served.line() as line:
        cookies = f"sessionid={session}; csrftoken={'x' * 32}"
        line.ask("POST", "/admin/", **how, Cookie=cookies, Expect="100-continue")

        assert line.told().status == 400


def test_bodies_without_a_length_may_be_small(served: Served, settings: Any) -> None:
    settings.FL_OPEN_REGISTRATION = True
    body = json.dumps({"username": "ada", "password": "a long pass phrase"}).encode()
    how = {"Transfer_Encoding": "chunked", "Content_Type": "application/json"}

    with served.line() as line:
        line.ask("POST", "/api/users/", b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body), **how)
        assert line.told().status == 201
        line.ask("POST", "/api/users/", b"%x\r\n%s\r\n0\r\n\r\n" % (2**17, b" " * 2**17), **how)
        refused = line.told()

    assert User.objects.filter(username="ada").exists()
    assert (refused.status, refused.json["code"]) == (411, "LENGTH_REQUIRED")


@pytest.mark.parametrize(
    ("said", "status", "code"),
    [
        (b"nonsense\r\n\r\n", 400, "BAD_REQUEST"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400, None),
        (
            b"POST / HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            400,
            None,
        ),
        (b"GET / HTTP/1.1\r\nX: " + b"x" * 10**5, 431, "HEAD_TOO_LARGE"),
        (b"GET /" + b"x" * 10**5, 431, "HEAD_TOO_LARGE"),
    ],
    ids=["nonsense", "two lengths", "length and chunks", "large header", "large address"],
)
def test_what_is_no_request_is_refused_in_our_words(
    served: Served, said: bytes, status: int, code: str | None
) -> None:
    with served.line() as line:
        line.say(said)

        told = line.told()
        assert told.status == status
        assert told.json["code"] == (code or "BAD_REQUEST")
        assert line.ended()


# --- what must not have changed ---------------------------------------------------------------


def test_a_large_upload_comes_back_whole_and_in_part(served: Served) -> None:
    token = token_issue(user=person("ada", actor=True))
    data = save({"w": np.arange(3_000_000, dtype=np.float32)})
    head = b'--B\r\nContent-Disposition: form-data; name="%s"\r\n\r\nx\r\n'
    file = b'--B\r\nContent-Disposition: form-data; name="model_file"; filename="w"\r\n\r\n'
    body = head % b"name" + head % b"description" + file + data + b"\r\n--B--\r\n"
    form = {"Content_Type": "multipart/form-data; boundary=B", "Content_Length": str(len(body))}

    with served.line(token) as line:
        line.ask("POST", "/api/models/", **form, Expect="100-continue")
        assert line.socket.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        line.say(body)
        made = line.told()
        path = f"/api/models/{made.json['model_id']}/"
        line.ask("GET", path)
        whole = line.told()
        line.ask("GET", path, Range="bytes=1000000-8999999")
        part = line.told()
        line.ask("HEAD", path)
        head_only = line.told("HEAD")
        line.ask("GET", path, If_None_Match=whole.headers["etag"])
        same = line.told()

    assert made.status == 201, made.body
    assert whole.body == data
    assert (part.status, part.body) == (206, data[1_000_000:9_000_000])
    assert (head_only.body, head_only.headers["content-length"]) == (b"", str(len(data)))
    assert same.status == 304


def test_a_stream_of_events_is_sent_as_it_happens_and_ends_with_its_reader(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "SILENCE_SECONDS", 0.0)
    monkeypatch.setattr(watching, "LOOK_SECONDS", 0.2)
    told = scene("ada", started=False)
    token = token_issue(user=told.actor)

    with served.line(token) as line:
        line.ask("GET", f"/api/trainings/{told.training.pk}/events/")
        response = http.client.HTTPResponse(line.socket)
        response.begin()
        assert response.readline() == b"retry: 2000\n"
        training_start(training=told.training, user=told.actor)
        lines = iter(response.readline, b"")
        assert any(b'"state": "O"' in text for text in lines)
        response.close()
    until(lambda: wakeups._waiting == 0, "the end of the stream")


def test_a_kill_point_after_an_answer_is_where_its_client_can_read_it() -> None:
    readable: list[list[socket.socket]] = []

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        environ[SENT].append(lambda: readable.append(select.select([line.socket], [], [], 0)[0]))
        start_response("200 OK", [("Content-Length", "2")])
        return [b"ok"]

    web = Web(("127.0.0.1", 0), app, threads=1, tls=None)
    web.open()
    with Line(web.port) as line:
        line.ask("GET", "/")
        until(lambda: readable, "the point", ENOUGH)

        assert readable == [[line.socket]]
        assert line.told().body == b"ok"
    web.close()


def test_a_stream_ends_with_its_reader_also_if_he_has_asked_for_more(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "SILENCE_SECONDS", 0.0)
    monkeypatch.setattr(watching, "LOOK_SECONDS", 0.2)
    told = scene("ada", started=False)

    with served.line(token_issue(user=told.actor)) as line:
        line.ask("GET", f"/api/trainings/{told.training.pk}/events/")
        until(lambda: wakeups._waiting == 1, "the stream")
        line.ask("GET", "/livez")

    until(lambda: wakeups._waiting == 0, "the end of the stream")


def test_fields_after_a_body_are_not_those_before_it(served: Served) -> None:
    with served.line() as line:
        line.ask(
            "POST",
            "/livez",
            b"2\r\n{}\r\n0\r\nX-Request-ID: trailing-0001\r\nHost: elsewhere\r\n\r\n",
            Transfer_Encoding="chunked",
            X_Request_ID="leading-0001",
        )
        told = line.told()
        line.ask("GET", "/livez", X_Request_ID="the-next-0001")
        following = line.told()

    assert told.headers["x-request-id"] == "leading-0001"
    assert following.headers["x-request-id"] == "the-next-0001"


def test_an_old_client_is_not_sent_chunks(served: Served) -> None:
    with served.line() as line:
        line.say(b"GET /api/users/ HTTP/1.0\r\nHost: elsewhere\r\n\r\n")
        told = line.told()

    assert (told.status, told.json["code"]) == (400, "INVALID_HOST")
    assert "transfer-encoding" not in told.headers


def test_strangers_send_no_files(served: Served, settings: Any) -> None:
    settings.FL_OPEN_REGISTRATION = True
    how = {"Content_Type": "multipart/form-data; boundary=B", "Content_Length": str(5 * 2**20)}

    for path, status in (("/api/users/", 413), ("/admin/login/", 400)):
        with served.line() as line:
            line.ask("POST", path, **how, Cookie=f"csrftoken={'x' * 32}", Expect="100-continue")
            told = line.told()
        assert told.status == status, (path, told)


def test_only_a_proxy_can_say_what_it_says(served: Served) -> None:
    with served.line() as line:
        line.say(
            b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX_Request_Id: underscored-0001\r\n\r\n"
        )
        underscored = line.told()
        line.ask("GET", "/livez", X_Request_ID="with-dashes-0001")
        dashed = line.told()

    assert underscored.headers["x-request-id"] != "underscored-0001"
    assert dashed.headers["x-request-id"] == "with-dashes-0001"


def test_a_path_is_taken_byte_by_byte(served: Served) -> None:
    token = token_issue(user=person("ada"))

    for path in ("/api/models/%FF%FE/", "/api/users/a%2Fb/", "/api/nowhere%00/"):
        assert served.get(path, token).status == 404


def test_a_large_body_of_json_or_of_a_form_arrives_whole_or_is_refused(
    served: Served, settings: Any
) -> None:
    settings.FL_OPEN_REGISTRATION = True
    fields = {"password": "a long pass phrase", "actor": True}
    said = {"json": json.dumps, "x-www-form-urlencoded": urlencode}

    def post(kind: str, size: int, **headers: Any) -> Told:
        start = {"filling": "x" * size, "username": kind[:4]}
        body = said[kind]({**start, **fields}).encode()
        how = {"Content_Type": f"application/{kind}", "Content_Length": len(body)}
        with served.line() as line:
            line.ask("POST", "/api/users/", body, **how)
            return line.told()

    answers = [post("json", 3 * 2**20), post("x-www-form-urlencoded", 2 * 2**20)]
    too_large = post("json", 5 * 2**20)

    assert [told.status for told in answers] == [201, 201], answers
    assert User.objects.filter(actor=True).count() == 2
    assert (too_large.status, too_large.json["code"]) == (413, "TOO_LARGE")


def test_json_over_the_limit_is_too_large_for_who_may_send_files_too(served: Served) -> None:
    size = 5 * 2**20
    with served.line(token_issue(user=person("ada", actor=True))) as line:
        how = {"Content_Type": "application/json", "Content_Length": size}
        line.ask("POST", "/api/groups/", b'{"name": "' + b"x" * (size - 12) + b'"}', **how)
        told = line.told()

    assert (told.status, told.json["code"]) == (413, "TOO_LARGE")


def test_a_form_that_its_client_did_not_end_is_not_taken_for_a_whole_one(
    served: Served, settings: Any
) -> None:
    settings.FL_OPEN_REGISTRATION = True
    form = {"Content_Type": "application/x-www-form-urlencoded", "Content_Length": "200000"}
    line = served.line()

    line.ask("POST", "/api/users/", b"username=ada&password=a+long+pass+phrase&x=", **form)
    line.say(b"x" * 100_000)
    until(lambda: served.front.bodies.taken() == 1, "the form")
    line.close()
    until(lambda: served.front.bodies.taken() == 0, "its end")

    assert not User.objects.exists()


@pytest.mark.parametrize("size", [-1, None, 3 * 2**20 - 1, 3 * 2**20 + 1])
def test_a_body_is_read_as_far_as_asked_while_it_comes(size: int | None) -> None:
    data = bytes(range(256)) * (3 * 2**12)

    async def read() -> bytes:
        messages = deque(
            {"body": data[start : start + 10**5], "more_body": start + 10**5 < len(data)}
            for start in range(0, len(data), 10**5)
        )

        async def receive() -> dict[str, Any]:
            assert body._held < AHEAD
            return messages.popleft()

        body = Upload(lambda: True)
        filling = asyncio.create_task(body.fill(receive, Pace(ENOUGH, 0)))
        found = await asyncio.to_thread(body.read, size)
        filling.cancel()
        return found

    assert asyncio.run(read()) == data[: None if size == -1 else size]


def test_of_a_body_that_breaks_off_pieces_are_given_and_what_is_wanted_whole_is_not() -> None:
    async def read(size: int) -> list[int]:
        body, found = Upload(lambda: True), []
        body._put(b"x" * 100_000)
        body.end(OSError("the client has gone"))
        with pytest.raises(OSError, match="gone"):
            found.extend(len(data) for data in iter(lambda: body.read(size), b""))
        return found

    assert asyncio.run(read(PIECE)) == [PIECE, 100_000 - PIECE]
    assert asyncio.run(read(PIECE + 1)) == [PIECE + 1]
    assert asyncio.run(read(200_000)) == []


def test_lines_of_a_body_end_at_a_line_feed_or_after_a_mebibyte() -> None:
    async def lines() -> list[int]:
        body = Upload(lambda: True)
        body._put(b"a\n" + b"x" * (BLOCK + 9) + b"\nend")
        body.end()
        return [len(line) for line in iter(lambda: body.readline(10**9), b"")]

    assert asyncio.run(lines()) == [2, BLOCK, 10, 3]


def test_a_body_that_comes_byte_by_byte_is_held_in_few_pieces() -> None:
    async def sent() -> tuple[int, bytes]:
        body = Upload(lambda: True)
        for number in range(20_000):
            body._put(bytes([number % 256]))
        held = len(body._pieces)
        body.end()
        return held, body.read(-1)

    held, read = asyncio.run(sent())

    assert held <= 20_000 // 2**11
    assert read == bytes(number % 256 for number in range(20_000))
