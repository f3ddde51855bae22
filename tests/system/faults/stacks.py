"""Servers that are started again whenever they die, as Docker or systemd would, and killed on demand."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import httpx
import psycopg2

from tests.system.compose import Compose
from tests.system.faults.traps import Traps
from tests.system.processes import Process, environment, until
from tests.system.servers import Keeper, Postgres, Redis, free_port

# Leases and sweeps in seconds; as many attempts as it takes: here nothing is to be given up.
PATIENT = {
    "FL_OPEN_REGISTRATION": "1",
    "FL_LEASE_SECONDS": "3",
    "FL_SWEEP_SECONDS": "1",
    "FL_EVENT_ATTEMPTS": "1000",
    "FL_WEBHOOK_ATTEMPTS": "1000",
    "FL_WEBHOOK_ALLOW_PRIVATE": "1",
    "FL_ADMIN_PASSWORD": "not a secret here",
    "FL_INFERENCE_THREADS": "1",
    "FL_INFERENCE_SECONDS": "120",
    "OMP_NUM_THREADS": "1",
}


class Stack(Protocol):
    """What the lanes and the schedule need of a deployment."""

    base: str
    folder: Path
    traps: Traps
    targets: Sequence[str]

    def up(self) -> contextlib.AbstractContextManager[None]: ...
    def kill(self, target: str) -> None: ...
    def start(self, target: str) -> None: ...
    def rows(self, query: str, *values: object) -> list[tuple[object, ...]]: ...
    def logs(self) -> str: ...


class Supervisor:
    """Starts what has died, unless it is held down."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[Process, Keeper]] = {}
        self._down: set[str] = set()
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="supervisor")
        self.restarts = 0

    def __enter__(self) -> "Supervisor":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()
        for process, keeper in self._kept.values():
            kill_family(process)
            keeper.forget()

    def run(self, name: str, command: Sequence[str], env: Mapping[str, str], log: Path) -> Process:
        process, keeper = Process(command, env=env, log=log), Keeper()
        keeper.note(process.pid)
        with self._lock:
            self._kept[name] = process, keeper
        return process

    def kill(self, name: str) -> None:
        with self._lock:
            self._down.add(name)
            kill_family(self._kept[name][0])

    def start(self, name: str) -> None:
        with self._lock:
            self._down.discard(name)

    def log(self, name: str) -> str:
        return self._kept[name][0].log

    def logs(self) -> str:
        return "\n".join(
            f"--- {name}\n{process.log[-6000:]}" for name, (process, _) in self._kept.items()
        )

    def _run(self) -> None:
        while not self._stopping.wait(0.1):
            with self._lock:
                for name, (process, keeper) in self._kept.items():
                    if name not in self._down and not process.running:
                        kill_family(process)
                        self.restarts += 1
                        process.start()
                        keeper.note(process.pid)


def kill_family(process: Process) -> None:
    """`kill -9` of a process and of its whole group, which the children of a dead parent are still in."""
    if process.running:
        process.kill_all()
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


class Embedded:
    """`manage.py serve` and its children."""

    targets = ("serve", "child")

    def __init__(self, folder: Path, **settings: str) -> None:
        self.folder, self.settings = folder, {**PATIENT, **settings}
        # One child never shares a round.
        self.traps = Traps(folder / "points", without=("slice", "hint.slices"))
        self.port = free_port()
        self.base = f"http://127.0.0.1:{self.port}"
        self._supervisor = Supervisor()

    @contextlib.contextmanager
    def up(self) -> Iterator[None]:
        env = environment(
            DJANGO_SETTINGS_MODULE="tests.system.faults.settings_embedded",
            FL_DATA_DIR=str(self.folder / "data"),
            FL_KILL_POINTS=str(self.traps.folder),
            **self.settings,
        )
        command = [sys.executable, "manage.py", "serve", "--port", str(self.port)]
        with self._supervisor:
            self._server = self._supervisor.run("serve", command, env, self.folder / "serve.log")
            self._server.wait_for("Serving at")
            yield

    def kill(self, target: str) -> None:
        if target == "serve":
            self._supervisor.kill("serve")
            return
        if self._server.running:
            for child in self._server.children():
                with contextlib.suppress(Exception):  # it may have died by itself
                    child.kill()

    def start(self, target: str) -> None:
        if target == "serve":
            self._supervisor.start("serve")

    def rows(self, query: str, *values: object) -> list[tuple[object, ...]]:
        import sqlite3

        path = self.folder / "data" / "db.sqlite3"
        with contextlib.closing(sqlite3.connect(path, timeout=30)) as database, database:
            return database.execute(query.replace("%s", "?"), values).fetchall()

    def logs(self) -> str:
        return self._supervisor.logs()


class Production:
    """docker-compose.yml's commands on PostgreSQL and Redis, without the proxy.

    With `FL_SHARED_ROUND_BYTES` there are two aggregation workers.
    """

    services = ("web", "worker", "aggregator", "inference", "beat")
    targets = (*services, "redis", "postgres")

    def __init__(self, folder: Path, **settings: str) -> None:
        self.folder, self.settings = folder, {**PATIENT, **settings}
        self.traps = Traps(folder / "points")
        self.port = free_port()
        self.base = f"http://127.0.0.1:{self.port}"
        self._supervisor = Supervisor()

    @contextlib.contextmanager
    def up(self) -> Iterator[None]:
        self.postgres, self.redis = Postgres(), Redis()
        try:
            self.url = self.postgres.create("faults")
            self._compose()
            with self._supervisor:
                self._start()
                yield
        finally:
            self.redis.stop()
            self.postgres.stop()

    def _compose(self) -> None:
        data = self.folder / "data"
        data.mkdir()
        workers = 2 if "FL_SHARED_ROUND_BYTES" in self.settings else 1
        self.compose = Compose(
            values={"FL_HOST": "localhost", "FL_WEB_THREADS": "40", "FL_INFERENCE_WORKERS": "1"},
            places={
                "0.0.0.0:8000": f"127.0.0.1:{self.port}",
                "/tmp/beat": str(self.folder / "beat"),  # noqa: S108 - in its container
                "--concurrency 4": "--concurrency 1",
                "-Q aggregation --concurrency 1": f"-Q aggregation --concurrency {workers}",
            },
        )
        self.env = environment(
            DJANGO_SETTINGS_MODULE="tests.system.faults.settings_production",
            FL_DATA_DIR=str(data),
            FL_DATABASE_URL=self.url,
            FL_REDIS_URL=self.redis.url,
            FL_SECRET_KEY="k" * 64 + "-only-for-this-test",
            FL_SSL_REDIRECT="0",
            FL_KILL_POINTS=str(self.traps.folder),
            **self.settings,
        )

    def _start(self) -> None:
        setup = self.compose.command("setup")
        subprocess.run(setup, env=self.env, check=True, capture_output=True, timeout=120)
        for name in self.services:
            command = self.compose.command(name)
            self._supervisor.run(name, command, self.env, self.folder / f"{name}.log")
        until(self._answers, "the web process", 120)
        for name in ("worker", "aggregator", "inference"):
            until(lambda name=name: " ready." in self._supervisor.log(name), name, 120)

    def _answers(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{self.base}/api/users/", timeout=10).status_code == 401
        return False

    def kill(self, target: str) -> None:
        if target == "redis":
            self.redis.kill()
        elif target == "postgres":
            self.postgres.kill()
        else:
            self._supervisor.kill(target)

    def start(self, target: str) -> None:
        if target == "redis":
            self.redis.start()
        elif target == "postgres":
            self.postgres.start()
        else:
            self._supervisor.start(target)

    def rows(self, query: str, *values: object) -> list[tuple[object, ...]]:
        for _ in range(100):  # it may be down, or recovering
            with (
                contextlib.suppress(psycopg2.OperationalError),
                contextlib.closing(psycopg2.connect(self.url)) as connection,
            ):
                connection.autocommit = True
                with connection.cursor() as cursor:
                    cursor.execute(query, values)
                    return cursor.fetchall() if cursor.description else []
            time.sleep(0.2)
        raise TimeoutError("PostgreSQL didn't answer for 20 s")

    def logs(self) -> str:
        return self._supervisor.logs()
