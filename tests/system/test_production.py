"""docker-compose.yml's own commands and environments, as processes, with PostgreSQL and Redis."""

import contextlib
import http.client
import re
import select
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import httpx
import psutil
import psycopg2
import pytest
import trustme

from tests.system.compose import Compose
from tests.system.processes import Process, ended, environment, started, until
from tests.system.questions import asked
from tests.system.servers import Postgres, Redis, free_port
from tests.system.sites import Cohort, digest, expected, model
from tests.system.tls_proxy import TlsProxy

pytestmark = pytest.mark.system
SHARED_BYTES = 100_000_000
LONG_RUNNING = ("web", "worker", "aggregator", "inference", "beat")


class Deployment:
    """What `docker compose up` starts, and a proxy with a certificate of its own authority."""

    def __init__(self, folder: Path, database_url: str, redis: Redis) -> None:
        self.folder, self.database_url, self.redis = folder, database_url, redis
        self.web_port = free_port()
        secrets, data = folder / "secrets", folder / "data"
        secrets.mkdir()
        data.mkdir()
        for name, text in {
            "fl_secret_key": "k" * 64 + "-only-for-this-test",
            "fl_database_url": database_url,
            "fl_admin_password": "an admin's long password",
        }.items():
            (secrets / name).write_text(text + "\n")
        self.compose = Compose(
            values={
                "FL_HOST": "localhost",
                "FL_OPEN_REGISTRATION": "1",
                "FL_LEASE_SECONDS": "3",
                "FL_SWEEP_SECONDS": "1",
                "FL_SHARED_ROUND_BYTES": str(SHARED_BYTES),
            },
            places={
                "/run/secrets": str(secrets),
                "redis://redis:6379/0": redis.url,
                "/data": str(data),
                "0.0.0.0:8000": f"127.0.0.1:{self.web_port}",
                "127.0.0.1:8000": f"127.0.0.1:{self.web_port}",
                "/tmp/beat": str(folder / "beat"),  # noqa: S108 - in its container
            },
        )
        ca = trustme.CA()
        self.ca = folder / "ca.pem"
        ca.cert_pem.write_to_path(self.ca)
        self.proxy = TlsProxy(("127.0.0.1", self.web_port), ca)
        self.base = f"https://localhost:{self.proxy.port}"
        self.trust = ssl.create_default_context(cafile=str(self.ca))
        self.processes: dict[str, Process] = {}

    def env(self, service: str) -> dict[str, str]:
        return environment(**self.compose.environment(service))

    def once(self, *command: str) -> str:
        """Run a command to its end in the environment of `setup`; its output."""
        done = subprocess.run(
            command, env=self.env("setup"), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    @contextlib.contextmanager
    def up(self) -> Iterator[None]:
        self.once(*self.compose.command("setup"))
        with contextlib.ExitStack() as stack:
            for name in LONG_RUNNING:
                self.processes[name] = stack.enter_context(
                    started(
                        self.compose.command(name),
                        env=self.env(name),
                        log=self.folder / f"{name}.log",
                    )
                )
            check = self.compose.healthcheck("web")
            until(lambda: subprocess.run(check, env=self.env("web")).returncode == 0, "web")
            for name in ("worker", "aggregator", "inference"):
                self.processes[name].wait_for(" ready.")
            yield
            for process in self.processes.values():  # all at once: each takes seconds to end
                process.popen.terminate()

    @contextlib.contextmanager
    def clients(self, cohort: Cohort, name: str) -> Iterator[list[Process]]:
        """One process for each site, from the client package that sites install."""
        with contextlib.ExitStack() as stack:
            yield [
                stack.enter_context(self.client(name, site.number, site.token))
                for site in cohort.sites
            ]

    def client(
        self, name: str, number: int, token: str, ca: Path | None = None
    ) -> contextlib.AbstractContextManager[Process]:
        command = [sys.executable, "-m", "tests.system.client_process", self.base]
        command += ["--token", token, "--ca", str(ca or self.ca), "--number", str(number)]
        command += ["--workdir", str(self.folder / f"{name}-{number}")]
        log = self.folder / f"{name}-{number}.log"
        return started(command, env=environment(), log=log)

    def gather(self, name: str, size: int, rounds: int = 3, **options: object) -> Cohort:
        return Cohort.gather(
            self.base,
            model(size),
            sites=4,
            rounds=rounds,
            verify=self.trust,
            prefix=name,
            **options,
        )

    def rows(self, query: str, *values: object) -> list[tuple[object, ...]]:
        with contextlib.closing(psycopg2.connect(self.database_url)) as connection:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(query, values)
                return cursor.fetchall()


@pytest.fixture(scope="module")
def deployment(
    tmp_path_factory: pytest.TempPathFactory, postgres: Postgres
) -> Iterator[Deployment]:
    redis = Redis()  # not the session's: a test kills it
    url = postgres.create(f"production_{time.monotonic_ns()}")
    deployed = Deployment(tmp_path_factory.mktemp("production"), url, redis)
    try:
        with deployed.up():
            yield deployed
    finally:
        deployed.proxy.close()
        redis.stop()


def finished(clients: list[Process], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    for client in clients:
        while client.running and time.monotonic() < end:
            time.sleep(0.05)
        assert client.popen.returncode == 0, f"{client.popen.returncode}: {client.log[-4000:]}"


def test_four_client_processes_train_over_tls_to_the_exact_average(deployment: Deployment) -> None:
    cohort = deployment.gather("exact", 1000)

    with deployment.clients(cohort, "exact") as clients:
        finished(clients)

    result = digest(expected(model(1000), sites=4, rounds=3))
    assert cohort.state == "C"
    assert digest(cohort.weights()) == result
    assert all(result in client.log for client in clients)


def test_a_client_with_the_wrong_authority_sends_nothing(deployment: Deployment) -> None:
    stranger = deployment.folder / "stranger.pem"
    trustme.CA().cert_pem.write_to_path(stranger)
    before = list(deployment.proxy.requests)

    with deployment.client("stranger", 0, "no-such-token", ca=stranger) as client:
        until(lambda: "certificate" in client.log.lower() or not client.running, "its refusal")

    assert deployment.proxy.requests == before
    assert "no-such-token" not in client.log


def test_a_worker_killed_while_it_aggregates_changes_no_bit(deployment: Deployment) -> None:
    cohort = deployment.gather("killed", 4_000_000, skip_model_tests=True)
    aggregator = deployment.processes["aggregator"]
    running = "SELECT id FROM fl_server_core_trainerevent WHERE state = 'running'"

    with deployment.clients(cohort, "killed") as clients:
        until(lambda: deployment.rows(running), "an aggregation")
        aggregator.kill_all()
        assert deployment.rows(running), "it was over before the kill"
        aggregator.start()  # restart: unless-stopped
        finished(clients)

    assert digest(cohort.weights()) == digest(expected(model(4_000_000), sites=4, rounds=3))
    attempts = "SELECT max(attempt) FROM fl_server_core_trainerevent WHERE training_id = %s"
    assert deployment.rows(attempts, cohort.training) == [(2,)]


@pytest.mark.heavy
@pytest.mark.timeout(600)
def test_a_round_is_shared_by_two_workers_and_one_that_is_killed_costs_its_slice(
    deployment: Deployment,
) -> None:
    size = 8_000_000
    assert 4 * 4 * size > SHARED_BYTES
    cohort = deployment.gather("shared", size, skip_model_tests=True)
    command = [
        part.replace("aggregator@", "second@") for part in deployment.compose.command("aggregator")
    ]
    running = "SELECT count(*) FROM fl_server_core_workslice WHERE state = 'running'"
    log = deployment.folder / "second.log"

    with started(command, env=deployment.env("aggregator"), log=log) as second:
        second.wait_for(" ready.")
        second.wait_for("ready for aggregation")
        with deployment.clients(cohort, "shared") as clients:
            until(lambda: deployment.rows(running) >= [(2,)], "two slices at a time", 300)
            second.kill_all()
            left = deployment.rows(running)
            second.start()
            finished(clients, 300)
        both = deployment.processes["aggregator"].log + second.log

    assert left >= [(1,)], "it was over before the kill"
    assert digest(cohort.weights()) == digest(expected(model(size), sites=4, rounds=3))
    made = re.findall(
        rf"training {cohort.training} round (\d) columns (\d)/4: made, attempt (\d)", both
    )
    assert sorted({(round, index) for round, index, _ in made}) == [
        (str(round), str(index)) for round in range(3) for index in range(1, 5)
    ]
    assert len(made) == 12
    assert [attempt for *_, attempt in made].count("2") == 1
    assert deployment.rows("SELECT count(*) FROM fl_server_core_workslice") == [(0,)]


def test_a_pool_process_that_is_slow_to_import_torch_is_waited_for() -> None:
    from fl_server.celery import app

    assert app.conf.worker_proc_alive_timeout >= 60


@contextlib.contextmanager
def restarted(processes: Iterable[Process]) -> Iterator[None]:
    """`restart: unless-stopped`: kombu ends a worker that holds a message while Redis goes away."""
    stopped = threading.Event()

    def look() -> None:
        while not stopped.wait(0.2):
            for process in processes:
                if not process.running:
                    process.start()

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


def test_redis_killed_in_mid_run_costs_only_time(deployment: Deployment) -> None:
    cohort = deployment.gather("redis", 1000)
    updates = "SELECT count(*) FROM fl_server_core_localmodel WHERE training_id = %s"

    kept = restarted(deployment.processes.values())
    with kept, deployment.clients(cohort, "redis") as clients:
        until(lambda: deployment.rows(updates, cohort.training) > [(0,)], "the first update")
        deployment.redis.kill()
        until(lambda: deployment.rows(updates, cohort.training) >= [(4,)], "updates without Redis")
        deployment.redis.start()
        finished(clients)

    assert digest(cohort.weights()) == digest(expected(model(1000), sites=4, rounds=3))


def test_a_model_is_asked_through_its_own_queue(deployment: Deployment) -> None:
    answer, wanted = asked(deployment.base, verify=deployment.trust)

    assert answer == wanted
    worker = deployment.processes["inference"]
    assert "ready for inference" in worker.log
    assert "libtorch" not in Path(f"/proc/{worker.pid}/maps").read_text()


PEOPLE = """
from fl_server_core.models import User
from fl_server_core.services.tokens import token_issue
for number in range(60):
    user = User.objects.create(username=f"poller-{number}", client=True)
    print("token", token_issue(user=user))
"""


def test_waiting_polls_cost_no_threads_and_no_connections_and_outlive_those_who_hold_them(
    deployment: Deployment,
) -> None:
    said = deployment.once("python", "manage.py", "shell", "-v", "0", "-c", PEOPLE)
    tokens = [line.split()[1] for line in said.splitlines() if line.startswith("token")]
    web = deployment.processes["web"]
    asked_by = "SELECT count(last_seen_at) FROM fl_server_core_user WHERE username LIKE 'poller%%'"
    connected = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"

    with contextlib.ExitStack() as stack:
        lines = [stack.enter_context(poll(deployment, token)) for token in tokens * 4]
        until(lambda: deployment.rows(asked_by) == [(60,)], "the first question of each")
        # Once they all wait, there are those that processes keep for their next request, and no others.
        until(lambda: deployment.rows(connected) < [(30,)], "polls that only wait")
        assert httpx.get(f"http://localhost:{deployment.web_port}/livez", headers=PROXY).is_success
        family = [psutil.Process(web.pid), *web.children()]
        assert sum(process.num_threads() for process in family) < 60
        assert sum(process.memory_info().rss for process in family) < 400 * 2**20
        assert not readable(lines)

        victim = workers(web)[0]
        victim.kill()
        until(lambda: not victim.is_running(), "its end")  # buried: all of its files are closed
        cut = readable(lines)
        assert cut
        assert all(line.recv(1) == b"" for line in cut)
        until(lambda: len(workers(web)) == 2 and victim not in workers(web), "another worker")
        again = [stack.enter_context(poll(deployment, tokens[0], wait=0.1)) for _ in cut[:4]]
        assert all(b'"state":"wait"' in whole(line) for line in again)

        family = workers(web)
        web.kill()
        assert all(b'"state":"wait"' in whole(line) for line in lines if line not in cut)
        until(lambda: all(map(ended, family)), "the end of the workers")
    web.start()  # restart: unless-stopped
    check = deployment.compose.healthcheck("web")
    until(lambda: subprocess.run(check, env=deployment.env("web")).returncode == 0, "web")


PROXY = {"Host": "localhost", "X-Forwarded-Proto": "https"}


def workers(web: Process) -> list[psutil.Process]:
    alive = [child for child in web.children() if not ended(child)]
    return [child for child in alive if any("spawn_main" in word for word in child.cmdline())]


def poll(deployment: Deployment, token: str, wait: float = 25) -> socket.socket:
    line = socket.create_connection(("127.0.0.1", deployment.web_port), timeout=60)
    headers = {**PROXY, "Authorization": f"Token {token}"}
    head = [f"GET /api/tasks/?wait={wait} HTTP/1.1", *(": ".join(pair) for pair in headers.items())]
    line.sendall("\r\n".join([*head, "", ""]).encode())
    return line


def readable(lines: list[socket.socket]) -> list[socket.socket]:
    return select.select(lines, [], [], 0)[0]


def whole(line: socket.socket) -> bytes:
    answer = http.client.HTTPResponse(line)
    answer.begin()
    try:
        return answer.read()
    finally:
        answer.close()


def test_the_deployment_check_has_no_complaints(deployment: Deployment) -> None:
    said = deployment.once("python", "manage.py", "check", "--deploy", "--fail-level", "WARNING")

    assert "no issues" in said


def test_no_secret_is_in_the_compose_file_or_the_environment(deployment: Deployment) -> None:
    for name in (*LONG_RUNNING, "setup"):
        values = " ".join(deployment.compose.environment(name).values())
        assert "password" not in values.replace("fl_admin_password", "")
        assert "postgres://" not in values
    assert {path.parent for path in deployment.compose.secrets().values()} == {
        Path("deploy/secrets")
    }


def test_neither_web_nor_the_parents_of_the_workers_load_torch(deployment: Deployment) -> None:
    cohort = deployment.gather("maps", 10, rounds=1)
    threads = [site.start() for site in cohort.sites]
    for thread in threads:
        thread.join(60)

    aggregator = deployment.processes["aggregator"]
    lean = [deployment.processes["web"].pid, aggregator.pid, deployment.processes["beat"].pid]
    lean += [child.pid for child in deployment.processes["web"].children()]
    for pid in lean:
        assert "libtorch" not in Path(f"/proc/{pid}/maps").read_text()
    assert any("libtorch" in Path(f"/proc/{c.pid}/maps").read_text() for c in aggregator.children())
