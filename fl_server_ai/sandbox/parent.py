"""A worker's sandbox: programs in, predictions out; warm children, the least recently used one ended first."""

import contextlib
import logging
import os
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from fl_server_ai.containers.limits import Limits
from fl_server_ai.sandbox.descriptions import Description, parsed_description
from fl_server_ai.sandbox.plans import Dropout, Plan
from fl_server_ai.sandbox.preparation import Preparation
from fl_server_ai.sandbox.process import CPU_SECONDS, MOST_DRAWS, Child, Settings
from fl_server_ai.sandbox.programs import Program, check_program
from fl_server_ai.sandbox.tensors import RawTensor
from fl_server_core.exceptions import Invalid

log = logging.getLogger("fl.celery")

T = TypeVar("T")
Key = tuple[str, str, str, str, str]


class SandboxPool:
    """At most `children` warm programs at a time; one request at a time, other threads wait.

    `memory` bytes are what one program may take, its weights included, beside torch itself; `output` bytes what it
    may answer to one request; `threads` how many it calculates with, 0 for as many as there are cores.
    A child ends with the *thread* that started it, which therefore should be one that stays; one that
    is gone is replaced without a word. After a fork the new process has no children.
    """

    def __init__(
        self,
        *,
        children: int = 4,
        memory: int = 4 * 2**30,
        output: int = 256 * 2**20,
        threads: int = 0,
        device: str = "cpu",
        limits: Limits | None = None,
        environment: Mapping[str, str] | None = None,
        entry: str = Settings.entry,
    ) -> None:
        cores = threads or len(os.sched_getaffinity(0))
        self._settings = Settings(memory, output, cores, device, dict(environment or {}), entry)
        self._most = max(children, 1)
        self._limits = limits or Limits()
        self._lock = threading.Lock()
        self._children: OrderedDict[Key, Child] = OrderedDict()
        self._owner = os.getpid()
        self._empty = tempfile.TemporaryDirectory(prefix="fl-sandbox-")
        Path(self._empty.name).chmod(0o555)
        self.protections: dict[str, str] = {}  # of the last child that was started

    def predict(
        self,
        program: Program,
        inputs: Sequence[RawTensor],
        plan: Plan,
        *,
        timeout: float = 30.0,
        preparation: Preparation | None = None,
    ) -> list[RawTensor]:
        """Call the program with positional `inputs`: one tensor per draw, all alike, perhaps not finite.

        Of an answer that is a tuple, list or dict, its first tensor. `timeout`: seconds for loading and all
        draws, without the start of a child (about 3 s, once per program). `preparation` is for a single input.

        Raises `ForbiddenOperator`, `PickledEntry`, `BadContainer` before torch sees the program, `ProgramFailed`,
        `NoDropout`, `SandboxTimeout`, `SandboxMemory`, `SandboxCrashed` when it runs, `KeyMismatch` and
        `ShapeMismatch` for weights that are not its own, `BadImage`, `ImageTooLarge`, `InputShape` and
        `PreprocessingFailed` for an input that can't be prepared, and `SandboxUnavailable` when the server is at fault.
        """
        if isinstance(plan, Dropout) and not 1 <= plan.draws <= MOST_DRAWS:
            raise Invalid(f"from 1 to {MOST_DRAWS:,} draws, not {plan.draws}")
        ready = preparation or Preparation()
        return self._asked(
            program, timeout, lambda c, end: c.predict(tuple(inputs), plan, end, ready)
        )

    def describe(
        self, program: Program, shape: Sequence[int] | None = None, *, timeout: float = 30.0
    ) -> Description:
        """Layers and parameters; with `shape`, also what one run with zeros of it shows. Raises as `predict`."""
        text = self._asked(program, timeout, lambda c, end: c.describe(list(shape or ()), end))
        return parsed_description(bytes(text.data))

    def _asked(self, program: Program, timeout: float, ask: Callable[[Child, float], T]) -> T:
        with self._lock:
            before = program.before.digest if program.before else ""
            key = (program.digest, program.kind, self._settings.device, program.tenant, before)
            child = self._warm(key, timeout) or self._start(key, program)
            deadline = time.monotonic() + timeout
            try:
                if not child.loaded:
                    child.load(deadline)
                return ask(child, deadline)
            except BaseException:
                if not child.loaded or not child.usable:
                    self._drop(key)
                raise

    @property
    def pids(self) -> list[int]:
        """Of the warm children, the least recently used one first."""
        return [child.process.pid for child in self._children.values()]

    def close(self) -> None:
        """End all children; a later request starts new ones."""
        with self._lock:
            for key in list(self._children):
                self._drop(key)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
        self._empty.cleanup()

    def _warm(self, key: Key, timeout: float) -> Child | None:
        if self._owner != os.getpid():
            self._children.clear()  # they are another process's, and go on without us
            self._owner = os.getpid()
        child = self._children.get(key)
        if child is None:
            return None
        # Its processor time is limited for life; it must not run out in the middle of a request.
        spent = (child.busy + timeout) * self._settings.threads > CPU_SECONDS
        if spent or not child.usable:
            self._drop(key)
            return None
        self._children.move_to_end(key)
        return child

    def _start(self, key: Key, program: Program) -> Child:
        check_program(program.path, program.kind, self._limits)
        if program.before is not None:
            check_program(program.before.path, program.before.kind, self._limits)
        while len(self._children) >= self._most:
            self._drop(next(iter(self._children)))
        child = Child(program, self._settings, Path(self._empty.name))
        self._children[key] = child
        if child.protections != self.protections:
            _tell(child.protections, self.protections)
            self.protections = child.protections
        return child

    def _drop(self, key: Key) -> None:
        child = self._children.pop(key, None)
        if child is not None:
            with contextlib.suppress(ProcessLookupError):
                child.kill()


def _tell(protections: Mapping[str, str], before: Mapping[str, str]) -> None:
    """Log what programs are kept from, and what not, once each."""
    for name, told in protections.items():
        if told.startswith("off") and before.get(name) != told:
            log.warning("sandbox without %s (%s)", name, told.removeprefix("off: "))
    if not before:
        log.info("sandbox: %s", "; ".join(f"{n} {t}" for n, t in protections.items()))
