"""Real processes for tests: started, waited for, watched, killed by pid, never left behind."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent.parent
PATIENCE = 60.0  # seconds; only reached when something is broken


def environment(**values: str) -> dict[str, str]:
    """The caller's environment without any setting of ours, and then these."""
    ours = ("FL_", "DJANGO_", "CELERY", "PYTEST")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    bin_path = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", "")])
    python_path = os.pathsep.join(filter(None, [str(ROOT), kept.get("PYTHONPATH", "")]))
    return {**kept, "PATH": bin_path, "PYTHONPATH": python_path, "PYTHONUNBUFFERED": "1", **values}


def until(promise: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
    """Wait until it is true; TimeoutError names `what` otherwise."""
    end = time.monotonic() + seconds
    while not promise():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {seconds:.0f} s for {what}")
        time.sleep(0.02)


def ended(process: psutil.Process) -> bool:
    """Whether it is dead, buried by its parent or not."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


class Process:
    """One command with its children, in a session of its own; output goes to a file."""

    def __init__(
        self, command: Sequence[str], *, env: Mapping[str, str], log: Path, cwd: Path = ROOT
    ) -> None:
        self._command, self._env, self._cwd = list(command), dict(env), cwd
        self.log_path = log
        self.start()

    def start(self) -> None:
        """Start it (again, after a kill); the log goes on."""
        with self.log_path.open("ab") as log:
            self.popen = subprocess.Popen(
                self._command,
                env=self._env,
                cwd=self._cwd,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.pid = self.popen.pid

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    @property
    def running(self) -> bool:
        return self.popen.poll() is None

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.pid).children(recursive=True)

    def wait_for(self, text: str, seconds: float = PATIENCE) -> None:
        """Wait until the log holds the text."""
        until(lambda: text in self.log or not self.running, f"{text!r} in {self.log_path}", seconds)
        if text not in self.log:
            raise RuntimeError(f"{self._command} ended ({self.popen.returncode}):\n{self.log}")

    def kill(self) -> None:
        """`kill -9` of the main process alone; its children must notice by themselves."""
        self.popen.kill()
        self.popen.wait()

    def kill_all(self) -> None:
        """`kill -9` of the main process and everything below it."""
        family = self.children() if self.running else []
        self.kill()
        for child in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()

    def stop(self, seconds: float = 20.0) -> int:
        """SIGTERM, and the exit status; killed (-9) if that takes longer."""
        if self.running:
            self.popen.send_signal(signal.SIGTERM)
            try:
                self.popen.wait(seconds)
            except subprocess.TimeoutExpired:
                self.kill_all()
        return self.popen.wait()


@contextlib.contextmanager
def started(
    command: Sequence[str], *, env: Mapping[str, str], log: Path, cwd: Path = ROOT
) -> Iterator[Process]:
    """A process that has ended when the block is left, together with its children."""
    process = Process(command, env=env, log=log, cwd=cwd)
    family: list[psutil.Process] = []
    try:
        yield process
    finally:
        if process.running:
            family = process.children()
        process.stop()
        for child in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
