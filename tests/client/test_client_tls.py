"""A server with the wrong certificate learns nothing."""

import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

import fl_client
from fl_client import ConnectionFailed
from tests.client.fake_server import FakeServer, Reply

pytestmark = pytest.mark.enable_socket


@pytest.fixture
def hospital_ca() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def tls(hospital_ca: trustme.CA) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    hospital_ca.issue_cert("127.0.0.1").configure_cert(context)
    return context


def pem(ca: trustme.CA, folder: Path) -> Path:
    path = folder / "ca.pem"
    ca.cert_pem.write_to_path(str(path))
    return path


class Recorder:
    """Accepts TLS connections and keeps whatever a client says after the handshake."""

    def __init__(self, tls: ssl.SSLContext) -> None:
        self.handshakes = 0
        self.received = b""
        self._tls = tls
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._serve)
        self.url = f"https://127.0.0.1:{self._socket.getsockname()[1]}"

    def _serve(self) -> None:
        while True:
            connection, _ = self._socket.accept()
            with connection:
                connection.settimeout(10)
                if connection.recv(1, socket.MSG_PEEK) == b"":
                    return
                self.handshakes += 1
                try:
                    with self._tls.wrap_socket(connection, server_side=True) as secured:
                        self.received += secured.recv(65536)
                except OSError:
                    continue

    def __enter__(self) -> "Recorder":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        socket.create_connection(self._socket.getsockname()).close()
        self._thread.join()
        self._socket.close()


@pytest.fixture
def recorder(tls: ssl.SSLContext) -> Iterator[Recorder]:
    with Recorder(tls) as recorder:
        yield recorder


def test_a_wrong_ca_fails_before_credentials_are_sent(recorder: Recorder, tmp_path: Path) -> None:
    wrong = pem(trustme.CA(), tmp_path)

    with (
        fl_client.connect(recorder.url, token="secret", ca=wrong) as fl,
        pytest.raises(ConnectionFailed, match="certificate") as caught,
    ):
        fl.users.me()

    assert caught.value.code == "CERTIFICATE"
    assert recorder.handshakes == 1
    assert recorder.received == b""


def test_without_a_ca_only_public_authorities_are_believed(recorder: Recorder) -> None:
    with (
        fl_client.connect(recorder.url, token="secret") as fl,
        pytest.raises(ConnectionFailed, match="certificate"),
    ):
        fl.users.me()

    assert recorder.received == b""


def test_an_agent_does_not_keep_trying_a_wrong_certificate(
    recorder: Recorder, tmp_path: Path
) -> None:
    with pytest.raises(ConnectionFailed, match="certificate"):
        fl_client.run(
            fl_client.Client(),
            url=recorder.url,
            token="secret",
            ca=pem(trustme.CA(), tmp_path),
            workdir=tmp_path / "work",
        )


def test_the_right_ca_is_enough(
    hospital_ca: trustme.CA, tls: ssl.SSLContext, tmp_path: Path
) -> None:
    with FakeServer(tls=tls) as server:
        server.routes["GET", "/api/users/myself/"] = lambda asked: Reply(body={"id": "u"})
        url = server.url.replace("http", "https")

        with fl_client.connect(url, token="key", ca=pem(hospital_ca, tmp_path)) as fl:
            user = fl.users.me()

    assert user == {"id": "u"}


def test_a_ca_with_plain_http_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="plain http"):
        fl_client.connect("http://127.0.0.1:1", token="key", ca=pem(trustme.CA(), tmp_path))


def test_https_at_a_plain_server_ends_with_a_next_step(server: FakeServer, tmp_path: Path) -> None:
    https = server.url.replace("http:", "https:")

    with pytest.raises(ConnectionFailed, match="Next step: use http://") as refused:
        fl_client.run(fl_client.Client(), url=https, token="key", workdir=tmp_path)

    assert refused.value.code == "NOT_TLS"


def test_plain_http_at_a_tls_server_ends_with_a_next_step(
    tls: ssl.SSLContext, tmp_path: Path
) -> None:
    with FakeServer(tls=tls) as server:
        with pytest.raises(ConnectionFailed, match="Next step: use https://") as refused:
            fl_client.run(fl_client.Client(), url=server.url, token="key", workdir=tmp_path)

        assert refused.value.code == "NEEDS_TLS"
        assert server.asked == []


def test_a_proxy_that_wants_https_is_understood(server: FakeServer) -> None:
    said = b"<h1>400 Bad Request</h1>The plain HTTP request was sent to HTTPS port"
    server.faults["/api/trainings/"] = [Reply(400, said)]

    with (
        fl_client.connect(server.url, token="key") as fl,
        pytest.raises(ConnectionFailed, match="Next step: use https://"),
    ):
        fl.trainings.list()


@pytest.mark.parametrize("content", [None, "no certificate"], ids=["missing", "not PEM"])
def test_a_ca_file_that_is_none_is_named(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "server.pem"
    if content is not None:
        path.write_text(content)

    with pytest.raises(ConnectionFailed, match=r"server\.pem(.|\n)*Next step") as refused:
        fl_client.connect("https://127.0.0.1:1", token="key", ca=path)

    assert refused.value.code == "CA_FILE"
