"""Starting the server and the sites as processes, and ending every one of them whatever happens."""

import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
START_SECONDS = 60
STOP_SECONDS = 10


class DemoFailed(Exception):
    """Something that the demo promises did not happen."""


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def fresh(folder: Path) -> None:
    """Make `folder` empty; DemoFailed if a server is running on an earlier demo's data.

    Nothing but an earlier demo's folder is ever deleted: one that holds a `server.log`, or nothing.
    """
    lock = folder / "data" / "serve.lock"
    if lock.exists():
        with lock.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DemoFailed(f"a server is running on {folder / 'data'}; stop it") from None
    if (folder / "server.log").exists():
        shutil.rmtree(folder)
    elif folder.exists() and any(folder.iterdir()):
        raise DemoFailed(f"{folder} holds something that is not a demo's; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)


class Federation:
    """The processes of one demo run; leaving the `with` block ends them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = ""
        self.server: subprocess.Popen[bytes] | None = None
        self.sites: list[subprocess.Popen[str]] = []

    def __enter__(self) -> "Federation":
        return self

    def __exit__(self, *_: object) -> None:
        processes: list[subprocess.Popen[Any]] = [*self.sites]
        if self.server is not None:
            processes.append(self.server)
        for process in processes:
            if process.poll() is None:
                process.terminate()
        give_up = time.monotonic() + STOP_SECONDS
        for process in processes:
            try:
                process.wait(max(0.0, give_up - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def serve(self, password: str, patience: float = START_SECONDS) -> None:
        """Start `manage.py serve` on a free port and wait until it answers, at most `patience` seconds."""
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        environment = {
            **os.environ,
            "FL_DATA_DIR": str(self.folder / "data"),
            "FL_ADMIN_PASSWORD": password,
            "FL_OPEN_REGISTRATION": "1",
            "FL_WEBHOOK_ALLOW_PRIVATE": "1",
        }
        environment.pop("DJANGO_SETTINGS_MODULE", None)
        with (self.folder / "server.log").open("wb") as log:
            self.server = subprocess.Popen(
                [sys.executable, "manage.py", "serve", "--port", str(port)],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=log,
            )
        give_up = time.monotonic() + patience
        while not self._answers():
            if self.server.poll() is not None or time.monotonic() > give_up:
                raise DemoFailed(f"the server did not start; see {self.folder / 'server.log'}")
            time.sleep(0.1)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/livez", timeout=2) as answer:  # noqa: S310
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def start_site(self, job: dict[str, Any]) -> None:
        """Start one site's process; its job travels over standard input, so no token is in `ps`."""
        with (self.folder / f"site-{job['number']}.log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "demo.client"],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert process.stdin is not None  # noqa: S101 - it was asked for
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.close()
        self.sites.append(process)

    def check(self) -> None:
        """Raise `DemoFailed` if a process has ended badly."""
        for number, process in enumerate(self.sites):
            if process.poll() not in {None, 0}:
                log = self.folder / f"site-{number}.log"
                raise DemoFailed(f"site {number} ended with {process.returncode}; see {log}")
        if self.server is not None and self.server.poll() is not None:
            raise DemoFailed(f"the server ended; see {self.folder / 'server.log'}")

    def reports(self, seconds: float) -> list[dict[str, Any]]:
        """What each site says of itself when it is done."""
        give_up = time.monotonic() + seconds
        found = []
        for number, process in enumerate(self.sites):
            try:
                process.wait(max(1.0, give_up - time.monotonic()))
            except subprocess.TimeoutExpired as error:
                raise DemoFailed(f"site {number} did not end") from error
            self.check()
            assert process.stdout is not None  # noqa: S101 - it was asked for
            found.append(json.loads(process.stdout.readline()))
        return found
