"""Large uploads: a line may break as often as it likes, as long as bytes arrive in between."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fl_client import FLError, ServerError, upload
from fl_client.transport import Transport
from fl_client.upload import send_file
from tests.client.fake_server import Asked, FakeServer, Reply, refusal

pytestmark = pytest.mark.enable_socket
DATA = bytes(range(250)) * 4
URL = "/api/uploads/u/"
FORM = [("round", "0")]


class Hurried(threading.Event):
    """Waits for nothing, and remembers for how long it would have."""

    def __init__(self) -> None:
        super().__init__()
        self.pauses: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.pauses.append(timeout or 0.0)
        return False


class Tus:
    """What a server keeps of one upload: `piece` bytes of each PATCH, and then the line breaks."""

    def __init__(self, server: FakeServer, piece: int) -> None:
        self.kept, self.piece, self.away = b"", piece, 0
        self.patches = 0
        server.routes["POST", "/api/uploads/"] = lambda asked: Reply(
            201, {}, {"Location": "/api/uploads/u/"}
        )
        server.routes["HEAD", URL] = self.head
        server.routes["PATCH", URL] = self.patch

    def head(self, asked: Asked) -> Reply:
        if self.away:
            self.away -= 1
            return Reply(502)
        return Reply(200, b"", {"Upload-Offset": str(len(self.kept))})

    def patch(self, asked: Asked) -> Reply:
        assert int(asked.headers["Upload-Offset"]) == len(self.kept)
        self.patches += 1
        self.kept += asked.body[: self.piece]
        if len(self.kept) < len(DATA):
            return refusal(408, "TOO_SLOW")
        return Reply(204, b"")


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(upload, "LARGE", 100)
    (tmp_path / "update").write_bytes(DATA)
    return tmp_path / "update"


@pytest.fixture
def way(server: FakeServer) -> Iterator[Transport]:
    way = Transport(server.url, stop=Hurried())
    yield way
    way.close()


def pauses(way: Transport) -> list[float]:
    assert isinstance(way.stop, Hurried)
    return way.stop.pauses


def test_a_line_that_breaks_all_the_time_uses_up_no_attempts_while_bytes_arrive(
    way: Transport, server: FakeServer, path: Path
) -> None:
    tus = Tus(server, piece=50)
    server.routes["POST", "/api/models/m/"] = lambda asked: Reply(201, {"form": asked.form})

    answer = send_file(way, "models/m/", FORM, path)

    assert answer == {"form": {"round": ["0"], "upload": ["u"]}}
    assert tus.kept == DATA
    assert tus.patches == 20 > way.attempts
    assert max(pauses(way)) <= 1.0


def test_what_has_moved_waits_for_a_server_that_is_started_again(
    way: Transport, server: FakeServer, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tus = Tus(server, piece=250)
    server.routes["POST", "/api/models/m/"] = lambda asked: Reply(201, {})

    def restarted(asked: Asked) -> Reply:
        reply = tus.patch(asked)
        tus.away = 8 if tus.patches == 2 else 0
        return reply

    server.routes["PATCH", URL] = restarted

    send_file(way, "models/m/", FORM, path)

    assert tus.kept == DATA
    assert sum(pauses(way)) > 30


def test_an_announcement_whose_answer_was_lost_is_repeated_as_the_same(
    way: Transport, server: FakeServer, path: Path
) -> None:
    Tus(server, piece=len(DATA))
    server.routes["POST", "/api/models/m/"] = lambda asked: Reply(201, {})
    server.faults["/api/uploads/"] = [
        refusal(502, "LOST"),
        refusal(404, "UPLOAD_GONE"),
    ]

    send_file(way, "models/m/", FORM, path)

    lost, gone, new = (asked.headers["Idempotency-Key"] for asked in server.seen("/api/uploads/"))
    assert lost == gone != new


def test_a_server_that_never_answers_is_given_up_on_soon(
    way: Transport, server: FakeServer, path: Path
) -> None:
    Tus(server, piece=0)

    with pytest.raises(FLError):
        send_file(way, "models/m/", FORM, path)

    assert len(pauses(way)) == way.attempts - 1
    assert path.with_name("update.upload").exists()


def test_a_busy_server_is_asked_again_when_it_said_and_the_upload_is_sent_once(
    way: Transport, server: FakeServer, path: Path
) -> None:
    tus = Tus(server, piece=len(DATA))
    server.routes["POST", "/api/models/m/"] = lambda asked: Reply(201, {})
    server.faults["/api/models/m/"] = [refusal(503, "BUSY", Retry_After="5")] * 3

    send_file(way, "models/m/", FORM, path)

    assert tus.patches == 1
    assert [asked.form["upload"] for asked in server.seen("/api/models/m/")] == [["u"]] * 4
    assert min(pauses(way)) >= 5


def test_an_upload_outlives_a_server_that_stays_busy(
    way: Transport, server: FakeServer, path: Path
) -> None:
    tus = Tus(server, piece=len(DATA))
    server.routes["POST", "/api/models/m/"] = lambda asked: refusal(503, "BUSY", Retry_After="5")
    with pytest.raises(ServerError):
        send_file(way, "models/m/", FORM, path)

    server.routes["POST", "/api/models/m/"] = lambda asked: Reply(201, {})
    send_file(way, "models/m/", FORM, path)

    assert tus.patches == 1
    assert not path.with_name("update.upload").exists()
