"""What one connection may do to the server's front, whatever is behind it: here a small WSGI application."""

import fcntl
import json
import socket
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from fl_server.embedded.web import Web
from fl_server.front import app, exchange, protocol
from fl_server.front.answers import SHORT
from fl_server.front.protocol import PIPELINED
from fl_server_api.draining import DRAINED
from fl_server_api.stopping import STOP
from tests.lines import ENOUGH, Line
from tests.system.processes import until

pytestmark = pytest.mark.system
ROOM = 2**14
LARGE = 2**21


def echo(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
    """Says what it was asked, with which body."""
    body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    asked = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}"
    start_response("200 OK", [])
    return [json.dumps([asked, body.decode(), environ.get("HTTP_UPGRADE")]).encode()]


def opened(app: Callable[..., Any], threads: int = 1) -> Web:
    web = Web(("127.0.0.1", 0), app, threads=threads, tls=None)
    web.open()
    return web


@pytest.fixture(scope="module")
def web() -> Iterator[Web]:
    web = opened(echo)
    yield web
    web.close()


def connection(web: Web) -> HttpToolsProtocol:
    """The only one."""
    open_now = web._server.server_state.connections
    until(lambda: len(open_now) == 1, "one connection", ENOUGH)
    [found] = open_now
    assert isinstance(found, HttpToolsProtocol)
    return found


def unread(web: Web) -> int:
    """Bytes that have come but were not read."""
    count = fcntl.ioctl(
        connection(web).transport.get_extra_info("socket"), termios.FIONREAD, b"1234"
    )
    return int.from_bytes(count, sys.byteorder)


# --- requests that don't wait for the answer --------------------------------------------------


def test_of_thousands_of_requests_at_once_a_few_are_kept_and_answered() -> None:
    kept: list[int] = []
    sent = threading.Event()

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        sent.wait(ENOUGH)
        until(lambda: unread(web) == 0, "the requests", ENOUGH)
        kept.append(len(connection(web).pipeline))
        return echo(environ, start_response)

    web = opened(app)
    with Line(web.port) as line:
        line.say(b"".join(b"GET /%d HTTP/1.1\r\n\r\n" % number for number in range(10_000)))
        sent.set()
        answers = [line.told() for _ in range(PIPELINED + 1)]

        assert [answer.json[0] for answer in answers] == [f"GET /{n}" for n in range(PIPELINED + 1)]
        assert max(kept) == PIPELINED
        assert answers[-1].headers["connection"] == "close"
        assert line.ended()
    web.close()


def test_a_few_requests_at_once_are_answered_in_turn_and_more_may_follow(web: Web) -> None:
    with Line(web.port) as line:
        for _ in range(2):
            for number in range(PIPELINED):
                line.ask("POST", f"/{number}", b"a body", Content_Length=6)
            answers = [line.told().json for _ in range(PIPELINED)]

            assert [answer[:2] for answer in answers] == [
                [f"POST /{n}", "a body"] for n in range(PIPELINED)
            ]


# --- offers of another protocol ---------------------------------------------------------------


@pytest.mark.parametrize("together", [True, False], ids=["in one segment", "in two"])
@pytest.mark.parametrize(
    ("how", "body"),
    [
        ({"Content_Length": 30}, b"GET /smuggled HTTP/1.1\r\nX: y\r\n"),
        ({"Transfer_Encoding": "chunked"}, b"6\r\na body\r\n0\r\n\r\n"),
        ({}, b""),
    ],
    ids=["length", "chunks", "no body"],
)
def test_an_offer_to_speak_http_2_changes_nothing(
    web: Web, how: dict[str, Any], body: bytes, together: bool
) -> None:
    offer = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2_Settings": "AAMA"}

    with Line(web.port) as line:
        line.ask("POST", "/first", body if together else b"", **offer, **how)
        if not together:
            until(lambda: connection(web).cycle is not None, "the head", ENOUGH)
            line.say(body)
        line.ask("GET", "/second")
        first, second = line.told().json, line.told().json

    sent = {30: body.decode(), None: "a body" if body else ""}[how.get("Content_Length")]
    assert first == ["POST /first", sent, None]
    assert second == ["GET /second", "", None]


def test_a_tunnel_is_refused(web: Web) -> None:
    with Line(web.port) as line:
        line.say(b"CONNECT elsewhere:443 HTTP/1.1\r\nContent-Length: 4\r\n\r\nGET ")
        told = line.told()

        assert (told.status, told.json["code"]) == (400, "BAD_REQUEST")
        assert line.ended()


# --- who is slow, and who doesn't read --------------------------------------------------------


def large(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
    start_response("200 OK", [])
    return [bytes(LARGE)]


def narrow(web: Web) -> Web:
    """With little room for what is under way: what a client doesn't read, the server hasn't sent."""
    web._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, ROOM)
    return web


def gone(web: Web) -> None:
    state = web._server.server_state
    until(lambda: not state.connections and not state.tasks, "the end of the connection", ENOUGH)


def test_who_is_slow_but_moves_outlives_the_limit_of_silence_in_both_directions(
    web: Web, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    silence, pieces, pause = 0.8, 30, 0.06
    settings.FL_STALLED_SECONDS, settings.FL_SLOWEST_TRANSFER = silence, 1
    monkeypatch.setattr(exchange, "PATIENCE", 1)
    assert pieces * pause > 2 * silence
    sending = narrow(opened(large))
    with Line(web.port) as small, Line(web.port) as big, Line(sending.port, room=ROOM) as reader:
        small.ask("POST", "/small", Content_Length=pieces)
        big.ask("POST", "/big", Content_Length=pieces * 5_000)
        reader.ask("GET", "/", Connection="close")
        read = []
        for _ in range(pieces):
            small.say(b"x")
            big.say(b"x" * 5_000)
            read.append(reader.socket.recv(2 * ROOM))
            time.sleep(pause)
        read.extend(iter(lambda: reader.socket.recv(2**20), b""))

        assert small.told().json[1] == "x" * pieces
        assert big.told().json[1] == "x" * pieces * 5_000
        assert b"".join(read).endswith(b"\r\n\r\n" + bytes(LARGE))
    sending.close()


def test_a_reader_who_does_not_read_is_cut_off(
    settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.FL_STALLED_SECONDS = 0.1
    monkeypatch.setattr(exchange, "PATIENCE", 1)
    web = narrow(opened(large))
    with Line(web.port, room=ROOM) as line:
        line.ask("GET", "/")
        until(lambda: connection(web).flow.write_paused, "a full line", ENOUGH)

        gone(web)
    web.close()


def test_who_leaves_a_last_answer_unread_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "GOODBYE_SECONDS", 0.1)
    monkeypatch.setitem(globals(), "LARGE", SHORT)  # sent without waiting for the reader
    web = narrow(opened(large))
    with Line(web.port, room=ROOM) as line:
        line.ask("GET", "/", Connection="close")
        until(lambda: connection(web).transport.is_closing(), "the last answer", ENOUGH)

        gone(web)
    web.close()


def refuse(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
    """Reads nothing of a body."""
    start_response("507 Insufficient Storage", [])
    return [b"the disk is full"]


def test_who_is_still_sending_can_read_the_refusal_before_the_line_is_closed() -> None:
    web = opened(refuse)
    with socket.create_connection(("127.0.0.1", web.port), timeout=ENOUGH) as line:
        line.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n")
        line.sendall(bytes(DRAINED + 2**20))

        said = line.recv(2**16)
        line.sendall(
            bytes(2**20)
        )  # a line that was closed with bytes unread would be reset by that
        line.shutdown(socket.SHUT_WR)
        while more := line.recv(2**16):
            said += more

    assert said.startswith(b"HTTP/1.1 507 ")
    assert b"connection: close" in said
    assert said.endswith(b"the disk is full")
    web.close()


def test_a_long_answer_comes_whole_also_to_who_is_still_sending() -> None:
    web = opened(large)
    with socket.create_connection(("127.0.0.1", web.port), timeout=ENOUGH) as line:
        line.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n")
        line.sendall(bytes(DRAINED + 2**20))

        said = b""
        while len(said) < LARGE:
            said += line.recv(2**16)

    assert said.startswith(b"HTTP/1.1 200 ")
    web.close()


class Events:
    """A stream as Django makes them, with more to say than a line takes; it never ends by itself."""

    streaming = True

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop

    def __iter__(self) -> Iterator[bytes]:
        while not self._stop.is_set():
            yield bytes(2**20)

    def close(self) -> None:
        """Nothing is open."""


def test_a_reader_of_events_who_does_not_read_does_not_keep_a_server_from_stopping(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(app, "STREAM_SECONDS", 0.0)

    def stream(environ: dict[str, Any], start_response: Callable[..., Any]) -> Events:
        start_response("200 OK", [("Content-Type", "text/event-stream")])
        return Events(environ[STOP])

    web = opened(stream)
    with Line(web.port) as line:
        line.ask("GET", "/")
        until(lambda: connection(web).flow.write_paused, "a full line", ENOUGH)

        web.close()

    assert not web._thread.is_alive()
    assert [
        record for record in caplog.records if record.levelname == "ERROR"
    ] == []  # none cancelled
