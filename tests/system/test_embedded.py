"""`manage.py serve` as people run it: one training from start to end, and what a kill does to it."""

import contextlib
import functools
import os
import signal
import socket
import sqlite3
import ssl
import struct
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
import trustme

from tests.system.processes import ROOT, Process, ended, environment, started, until
from tests.system.questions import asked
from tests.system.servers import free_port
from tests.system.sites import Cohort, digest, expected, http, model

pytestmark = pytest.mark.system


class Embedded:
    """A data directory, a port, and the server on them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = folder / "data"
        self.port = free_port()
        self.base = f"http://127.0.0.1:{self.port}"

    @contextlib.contextmanager
    def serving(self, *arguments: str, **settings: str) -> Iterator[Process]:
        usual = {
            "FL_DATA_DIR": str(self.data),
            "FL_OPEN_REGISTRATION": "1",
            "FL_ADMIN_PASSWORD": "not a secret here",
            "FL_SWEEP_SECONDS": "1",
        }
        env = environment(**usual, **settings)
        command = [sys.executable, "manage.py", "serve", "--port", str(self.port), *arguments]
        with started(command, env=env, log=self.folder / "serve.log", cwd=ROOT) as process:
            process.wait_for("Serving at")
            yield process

    def child(self, server: Process) -> psutil.Process:
        """The warm child, once it is there."""
        found: list[psutil.Process] = []
        until(lambda: found.extend(server.children()) or found, "the child")
        return found[0]

    def rows(self, query: str) -> list[tuple[object, ...]]:
        uri = f"file:{self.data / 'db.sqlite3'}?mode=ro"
        with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=20)) as database:
            return database.execute(query).fetchall()


@pytest.fixture
def embedded(tmp_path: Path) -> Embedded:
    return Embedded(tmp_path)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Embedded, Process]]:
    """A server for all tests that leave it running: to start one takes longer than most of them."""
    embedded = Embedded(tmp_path_factory.mktemp("shared"))
    with embedded.serving() as server:
        yield embedded, server


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Embedded, Process]]:
    """The same with a certificate of its own."""
    embedded = Embedded(tmp_path_factory.mktemp("signed"))
    with embedded.serving("--self-signed") as server:
        yield embedded, server


def test_three_sites_train_three_rounds_to_the_exact_average(
    shared: tuple[Embedded, Process],
) -> None:
    start = model(1000)

    embedded, _ = shared

    cohort = Cohort.gather(embedded.base, start)
    cohort.run()

    assert cohort.state == "C"
    for name, array in expected(start, sites=3, rounds=3).items():
        np.testing.assert_array_equal(cohort.weights()[name], array)
    assert [site.rounds for site in cohort.sites] == [[0, 1, 2]] * 3


@pytest.mark.parametrize("how", ["reset", "closed"])
def test_an_upload_that_breaks_off_leaves_nothing_behind(
    shared: tuple[Embedded, Process], how: str
) -> None:
    embedded, server = shared
    staging, said = embedded.data / "staging", len(server.log)
    head = b'--B\r\nContent-Disposition: form-data; name="model_file"; filename="w"\r\n\r\n'
    linger = struct.pack("ii", 1, 0)  # closing sends a reset

    actor = {"username": f"actor-{how}", "password": "a long pass phrase", "actor": True}
    token = httpx.post(f"{embedded.base}/api/users/", json=actor).json()["token"]
    with socket.create_connection(("127.0.0.1", embedded.port)) as connection:
        connection.sendall(
            b"POST /api/models/ HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: multipart/form-data; boundary=B\r\nContent-Length: 90000000\r\n"
            b"Authorization: Token " + token.encode() + b"\r\n\r\n" + head + b"z" * 10**7
        )
        until(lambda: [*staging.glob("*.upload")], "the upload")
        if how == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)

    until(lambda: not [*staging.glob("*.upload")], "the end of the upload", seconds=10)
    assert "Traceback" not in server.log[said:]


def test_the_web_process_never_loads_torch(shared: tuple[Embedded, Process]) -> None:
    embedded, server = shared
    child = Path(f"/proc/{embedded.child(server).pid}/maps")
    until(lambda: "libtorch" in child.read_text(), "the child, warm before there is work")
    Cohort.gather(embedded.base, model(10), sites=1, rounds=1, prefix="lean-").run()

    maps = Path(f"/proc/{server.pid}/maps").read_text()
    assert "libtorch" not in maps


def test_a_model_is_asked_over_http_by_a_child_that_starts_with_the_first_question(
    embedded: Embedded,
) -> None:
    with embedded.serving() as server:
        until(lambda: len(server.children()) == 1, "the child for tensors")
        answer, wanted = asked(embedded.base)

        assert answer == wanted
        assert len(server.children()) == 3  # the one for questions, and the sandbox that it started
        assert "libtorch" not in Path(f"/proc/{server.pid}/maps").read_text()
        children = server.children()
        assert server.stop() == 0
    until(lambda: all(map(ended, children)), "the end of the sandbox")


def test_a_child_killed_while_it_aggregates_costs_only_time(
    shared: tuple[Embedded, Process],
) -> None:
    start = model(8_000_000)
    killed: list[int] = []

    embedded, server = shared
    cohort = Cohort.gather(embedded.base, start, prefix="big-", skip_model_tests=True)
    done = threading.Event()

    def kill_whoever_works() -> None:
        running = "SELECT id FROM fl_server_core_trainerevent WHERE state = 'running'"
        while not done.is_set() and len(killed) < 2:
            if embedded.rows(running):
                child = embedded.child(server)
                child.send_signal(signal.SIGKILL)
                killed.append(child.pid)
                until(functools.partial(ended, child), "the end of the child")
            time.sleep(0.002)

    killer = threading.Thread(target=kill_whoever_works)
    killer.start()
    try:
        cohort.run()
    finally:
        done.set()
        killer.join()

    assert killed
    attempts = embedded.rows("SELECT attempt FROM fl_server_core_trainerevent")
    assert max(attempts) > (1,)
    assert cohort.sites[0].final is not None
    final = cohort.sites[0].final["final_model"]["sha256"]
    assert final == digest(expected(start, sites=3, rounds=3))
    assert server.running


def test_a_child_that_dies_while_idle_is_replaced(shared: tuple[Embedded, Process]) -> None:
    embedded, server = shared
    first = embedded.child(server)
    first.send_signal(signal.SIGKILL)
    until(lambda: any(child.pid != first.pid for child in server.children()), "another", 15)

    Cohort.gather(embedded.base, model(10), sites=1, rounds=1, prefix="idle-").run()


def test_a_server_killed_between_rounds_goes_on_where_it_was(embedded: Embedded) -> None:
    start = model(1000)
    halfway, restarted = threading.Event(), threading.Event()

    def pause(site: int, round: int) -> None:
        if round == 1 and site > 0:  # site 0 has sent its update of round 1, the others have not
            halfway.set()
            restarted.wait(60)

    with embedded.serving() as server:
        cohort = Cohort.gather(embedded.base, start)
        for site in cohort.sites:
            site.before_upload = pause
        training = threading.Thread(target=cohort.run, daemon=True)
        training.start()
        assert halfway.wait(60)
        until(lambda: 1 in cohort.sites[0].rounds, "the update of site 0")
        child = embedded.child(server)
        server.kill()
        until(lambda: ended(child), "the end of the orphaned child", 10)

        server.start()
        until(lambda: server.log.count("Serving at") == 2, "the restart")
        restarted.set()
        training.join(120)

        assert cohort.state == "C"
        assert digest(cohort.weights()) == digest(expected(start, sites=3, rounds=3))


def test_a_second_server_on_the_same_folder_is_refused(shared: tuple[Embedded, Process]) -> None:
    embedded, server = shared
    second = Process(
        [sys.executable, "manage.py", "serve", "--port", str(free_port())],
        env=environment(FL_DATA_DIR=str(embedded.data)),
        log=embedded.folder / "second.log",
    )
    second.popen.wait(60)

    assert second.popen.returncode == 1
    assert f"another server (process {server.pid}) is using {embedded.data}" in second.log
    assert "Traceback" not in second.log


def test_a_stop_ends_long_polls_and_the_child_within_seconds(embedded: Embedded) -> None:
    with embedded.serving() as server:
        cohort = Cohort.gather(embedded.base, model(10), sites=2)
        child = embedded.child(server)
        cohort.sites[0].start()
        until(lambda: cohort.sites[0].rounds, "its update; it now waits for the other site")

        server.popen.send_signal(signal.SIGTERM)
        until(lambda: not server.running, "the end", 10)

        assert server.popen.returncode == 0
        assert ended(child)


def test_self_signed_is_trusted_by_those_who_hold_its_ca(signed: tuple[Embedded, Process]) -> None:
    embedded, server = signed
    base = embedded.base.replace("http:", "https:")
    ca = embedded.data / "tls" / "ca.pem"
    ours = ssl.create_default_context(cafile=str(ca))
    stranger = trustme.CA().cert_pem.bytes().decode()
    wrong = ssl.create_default_context(cadata=stranger)

    assert str(ca) in server.log
    for name in ("127.0.0.1", "localhost"):
        with http(base.replace("127.0.0.1", name), verify=ours) as client:
            assert client.get("/api/users/").status_code == 401
    with http(base, verify=wrong) as client, pytest.raises(httpx.ConnectError) as refused:
        client.get("/api/users/")
    assert "certificate verify failed" in str(refused.value)
    key = embedded.data / "tls" / "server-key.pem"
    assert os.stat(key).st_mode & 0o777 == 0o600


def test_certificates_are_kept_over_a_restart(signed: tuple[Embedded, Process]) -> None:
    embedded, server = signed
    folder = embedded.data / "tls"
    before = [(folder / name).read_bytes() for name in ("ca.pem", "server.pem")]

    server.stop()
    server.start()
    until(lambda: server.log.count("Serving at") == 2, "the restart")

    assert [(folder / name).read_bytes() for name in ("ca.pem", "server.pem")] == before


def test_a_site_that_stalls_in_its_handshake_stops_nobody(signed: tuple[Embedded, Process]) -> None:
    embedded, _ = signed
    ours = ssl.create_default_context(cafile=str(embedded.data / "tls" / "ca.pem"))
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(socket.create_connection(("127.0.0.1", embedded.port)))

        base = embedded.base.replace("http:", "https:")
        with http(base, verify=ours) as client:
            assert client.get("/api/users/", timeout=5).status_code == 401
