"""Hands ids of work to a warm child, and outlives it."""

import contextlib
import json
import logging
import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

from django.db import close_old_connections

from fl_server.settings.env import child_environment

log = logging.getLogger("fl.server")
RESPAWN_SECONDS = (0.0, 1.0, 5.0, 15.0)  # before the next child, by deaths in a row


class Executor:
    """One thread, one child, one piece of work at a time; ids that already wait are not queued twice.

    `module` is the child's. `drop_lease` is told the id that a child died with. With `lazy` there is no
    child before there is work.
    """

    def __init__(
        self,
        *,
        module: str,
        drop_lease: Callable[[int], None],
        lazy: bool = False,
        on_wake: Callable[[list[str]], None],
        on_hint: Callable[[str, list[int]], None],
    ) -> None:
        self._module = module
        self._drop_lease = drop_lease
        self._lazy = lazy
        self._on_wake = on_wake
        self._on_hint = on_hint
        self._todo: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._known: set[int] = set()
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._child: subprocess.Popen[str] | None = None
        # The child's death signal comes when the *thread* that started it ends: this one stays.
        name = module.rpartition(".")[2]
        self._thread = threading.Thread(target=self._run, daemon=True, name=f"executor of {name}")

    def start(self) -> None:
        self._thread.start()

    @property
    def child_pid(self) -> int | None:
        return self._child.pid if self._child else None

    def submit(self, row_id: int) -> None:
        """Have the work done soon; an id that waits already is left alone."""
        with self._lock:
            if row_id in self._known:
                return
            self._known.add(row_id)
        self._todo.put(row_id)

    def stop(self, seconds: float = 2.0) -> None:
        """End the child, in the middle of work if it must be: the row survives."""
        self._stopping.set()
        self._todo.put(None)
        child = self._child
        if child is not None and child.stdin is not None:
            child.stdin.close()
            try:
                child.wait(seconds)
            except subprocess.TimeoutExpired:
                child.kill()
        self._thread.join(seconds)

    def _run(self) -> None:
        deaths = 0
        waiting: int | None = None  # work that is not done, because its child died
        while not self._stopping.is_set():
            if self._lazy and waiting is None:
                waiting = self._todo.get()
                if waiting is None:
                    return
            child = self._spawn()
            try:
                self._await(child, "ready")
                while True:
                    row_id = self._next(child) if waiting is None else waiting
                    if row_id is None:
                        return
                    waiting = row_id
                    self._forget(row_id)
                    self._tell(child, row_id)
                    self._await(child, "done")
                    waiting, deaths = None, 0
            except ChildDiedError:
                if self._stopping.is_set():
                    return
                code = child.wait()
                log.warning("%s died (%s); another one starts", self._module, _why(code))
                if waiting is not None:
                    self._lose(waiting)
                pause = RESPAWN_SECONDS[min(deaths, len(RESPAWN_SECONDS) - 1)]
                deaths += 1
                self._stopping.wait(pause)

    def _next(self, child: subprocess.Popen[str]) -> int | None:
        """Wait for an id; a child that dies meanwhile is replaced before it is missed."""
        while child.poll() is None:
            with contextlib.suppress(queue.Empty):
                return self._todo.get(timeout=1.0)
        raise ChildDiedError

    def _spawn(self) -> subprocess.Popen[str]:
        self._child = subprocess.Popen(  # noqa: S603 - a module of ours
            [sys.executable, "-m", self._module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=child_environment(),
            text=True,
            bufsize=1,
        )
        return self._child

    def _tell(self, child: subprocess.Popen[str], row_id: int) -> None:
        assert child.stdin is not None  # noqa: S101 - it was asked for
        try:
            child.stdin.write(json.dumps({"run": row_id}) + "\n")
            child.stdin.flush()
        except (OSError, ValueError) as error:
            raise ChildDiedError from error

    def _await(self, child: subprocess.Popen[str], kind: str) -> None:
        """Read answers, passing on what is for others, until one of this kind."""
        assert child.stdout is not None  # noqa: S101 - it was asked for
        for line in child.stdout:
            message: dict[str, Any] = json.loads(line)
            if "wake" in message:
                self._on_wake(message["wake"])
            elif "hint" in message:
                self._on_hint(*message["hint"])
            elif kind in message:
                return
        raise ChildDiedError

    def _forget(self, row_id: int) -> None:
        with self._lock:
            self._known.discard(row_id)

    def _lose(self, row_id: int) -> None:
        try:
            close_old_connections()
            self._drop_lease(row_id)
        except Exception:  # the lease then expires by itself
            log.exception("%s: the lease of %s could not be dropped", self._module, row_id)
        finally:
            close_old_connections()


class ChildDiedError(Exception):
    """The pipe to the child is broken or at its end."""


def _why(code: int) -> str:
    return f"signal {-code}, out of memory?" if code < 0 else f"exit status {code}"
