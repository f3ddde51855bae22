"""One child process: started with nothing but what it needs, spoken to with a deadline, ended and reaped."""

import contextlib
import json
import logging
import mmap
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fl_server_ai.sandbox.channel import Channel, Gone, Late, TooMuch
from fl_server_ai.sandbox.errors import (
    BadImage,
    ImageTooLarge,
    InputShape,
    NoDropout,
    PreprocessingFailed,
    ProgramFailed,
    SandboxCrashed,
    SandboxMemory,
    SandboxTimeout,
    SandboxUnavailable,
)
from fl_server_ai.sandbox.frames import BadFrame
from fl_server_ai.sandbox.plans import Drawn, Dropout, Plan
from fl_server_ai.sandbox.preparation import Preparation
from fl_server_ai.sandbox.programs import Program
from fl_server_ai.sandbox.tensors import RawTensor
from fl_server_core.exceptions import DomainError, Invalid, KeyMismatch, ShapeMismatch

log = logging.getLogger("fl.celery")
START_SECONDS = 120.0  # torch's import on a busy machine
CPU_SECONDS = 3600  # of a child's life; see `SandboxPool`
GRACE = 2.0  # seconds that a child whose pipe is closed has to end
TEXT = 600
MOST_DRAWS = 10_000
DESCRIPTION = 16 * 2**20  # bytes
UNPRINTABLE = re.compile(r"[^\x20-\x7e\n\u00a0-\ud7ff]+")
PATHS = re.compile(r"/(?:[\w.+-]+/)+")
REASON = re.compile(r"^[\w.]*(?:Error|Exception): ", re.MULTILINE)
# What the child may say about the program; its word is not taken for anything else.
CODES: dict[str, type[DomainError]] = {
    "NO_DROPOUT": NoDropout,
    "KEY_MISMATCH": KeyMismatch,
    "SHAPE_MISMATCH": ShapeMismatch,
    "SANDBOX_MEMORY": SandboxMemory,
    "BAD_IMAGE": BadImage,
    "IMAGE_TOO_LARGE": ImageTooLarge,
    "INPUT_SHAPE": InputShape,
    "PREPROCESSING_FAILED": PreprocessingFailed,
}
# The child is as good as before.
HARMLESS = (
    NoDropout, ProgramFailed, KeyMismatch, ShapeMismatch, BadImage, ImageTooLarge, InputShape,
    PreprocessingFailed,
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Of all children of a worker. Sizes in bytes; `threads` each."""

    memory: int
    output: int
    threads: int
    device: str
    environment: Mapping[str, str] = field(default_factory=dict)  # for GPU drivers; no secrets
    entry: str = "fl_server_ai.sandbox.child"


class Child:
    """A started child. Every error but the `HARMLESS` ones that it has told leaves it dead."""

    def __init__(self, program: Program, settings: Settings, empty: Path) -> None:
        self.busy = 0.0  # seconds that it has worked
        self.loaded = False
        self._told = False  # an error, and now waits for the next request
        self._settings = settings
        self._before = program.before.path if program.before else None
        with program.path.open("rb") as file:
            demands = {
                "memory": settings.memory,
                "cpu_seconds": CPU_SECONDS,
                "empty": str(empty),
                "device": settings.device,
            }
            config = {
                "kind": program.kind,
                "program": file.fileno(),
                "threads": settings.threads,
                "demands": demands,
            }
            self.process = subprocess.Popen(  # noqa: S603 - our own module, arguments made here
                [sys.executable, "-P", "-m", settings.entry, json.dumps(config)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                cwd=empty,
                env=_environment(settings),
                pass_fds=(file.fileno(),),
            )
        assert self.process.stdin is not None  # noqa: S101 - it was asked for
        assert self.process.stdout is not None  # noqa: S101
        self.channel = Channel(self.process.stdin, self.process.stdout)
        try:
            hello, _ = self.channel.receive(time.monotonic() + START_SECONDS)
            self.protections = _protections(hello)
        except (Late, Gone, TooMuch, BadFrame) as error:
            self.kill()
            raise SandboxUnavailable(
                f"the sandbox does not start ({type(error).__name__}, exit status "
                f"{self.process.returncode}); the worker's log says more"
            ) from error

    @property
    def usable(self) -> bool:
        """It lives, and keeps silent until it is asked."""
        return self.process.poll() is None and not self.channel.speaks

    def load(self, deadline: float) -> None:
        """Have the program loaded; `ProgramFailed` if torch can't."""
        with self._watched():
            before = [] if self._before is None else [_mapped(self._before, self._settings)]
            self.channel.send({"op": "load"}, before, deadline)
            self._answer("loaded", deadline)
            self.loaded = True

    def predict(
        self,
        inputs: tuple[RawTensor, ...],
        plan: Plan,
        deadline: float,
        preparation: Preparation,
    ) -> list[RawTensor]:
        """One tensor per draw, all of one dtype and shape."""
        with self._watched():
            request = _request(inputs, plan, self._settings)
            request["preparation"] = preparation.request()
            self.channel.send(request, _sent(inputs, plan), deadline)
            outputs: list[RawTensor] = []
            if isinstance(plan, Drawn):
                for weights in plan.weights():
                    self.channel.send({"op": "draw"}, list(weights), deadline)
                    self._draw(outputs, deadline)
                self.channel.send({"op": "end"}, [], deadline)
            else:
                for _ in range(plan.draws if isinstance(plan, Dropout) else 1):
                    self._draw(outputs, deadline)
            ended, _ = self._heard("done", deadline)
            if isinstance(plan, Drawn) and plan.calibration and plan.calibrated:
                plan.calibrated(_layers(ended))
            return outputs

    def describe(self, shape: list[int], deadline: float) -> RawTensor:
        """The bytes of a JSON text; a child's word, to be checked."""
        with self._watched():
            self.channel.send({"op": "describe", "shape": shape}, [], deadline)
            found = self._answer("described", deadline, DESCRIPTION)
            if len(found) != 1:
                raise BadFrame("a description is one tensor")
            return found[0]

    def kill(self) -> None:
        """End it, whatever it does, and wait until it has."""
        self.process.kill()
        self.process.wait()
        self.channel.close()

    def _draw(self, outputs: list[RawTensor], deadline: float) -> None:
        left = self._settings.output - sum(output.nbytes for output in outputs)
        found = self._answer("draw", deadline, left)
        if len(found) != 1:
            raise BadFrame("a draw is one tensor")
        outputs.append(found[0])
        if (found[0].dtype, found[0].shape) != (outputs[0].dtype, outputs[0].shape):
            raise ProgramFailed("the program answers another shape or dtype in each draw")

    def _answer(self, kind: str, deadline: float, most: int = 0) -> list[RawTensor]:
        return self._heard(kind, deadline, most)[1]

    def _heard(
        self, kind: str, deadline: float, most: int = 0
    ) -> tuple[dict[str, Any], list[RawTensor]]:
        header, tensors = self.channel.receive(deadline, most)
        if "error" in header:
            self._told = True
            raise _failure(header["error"])
        if kind not in header:
            raise BadFrame(f"{kind} was expected")
        return header, tensors

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """Name what goes wrong, and leave no child behind that may be in any state."""
        started = time.monotonic()
        self._told = False
        try:
            yield
        except BaseException as error:
            if not (self._told and isinstance(error, HARMLESS)):
                # One that is gone by itself may still be about to leave; how, says why.
                if isinstance(error, Gone):
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        self.process.wait(GRACE)
                ended = self.process.poll()
                self.kill()
                _raise_named(error, ended)
            raise
        finally:
            self.busy += time.monotonic() - started


def _mapped(path: Path, settings: Settings) -> RawTensor:
    """A file's bytes, which stay on the disk until they are sent."""
    size = path.stat().st_size
    if size > settings.memory // 2:  # the child holds it twice
        raise SandboxMemory(f"the preprocessing has {size:,} bytes, more than is allowed")
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return RawTensor("U8", (size,), memoryview(mapping))


def _raise_named(error: BaseException, ended: int | None) -> None:
    if isinstance(error, Late):
        raise SandboxTimeout("the program took too long and was ended") from error
    if isinstance(error, TooMuch):
        raise SandboxMemory(
            f"the program answers {error.size:,} bytes, more than is allowed"
        ) from error
    if isinstance(error, Gone) and ended == -signal.SIGXCPU:
        raise SandboxTimeout("the program used too much processor time and was ended") from error
    if isinstance(error, Gone) and ended == -signal.SIGKILL:
        raise SandboxMemory(
            "the program was ended by the system, which was probably out of memory"
        ) from error
    if isinstance(error, Gone):
        raise SandboxCrashed(f"the program's process ended ({_why(ended)})") from error
    if isinstance(error, BadFrame):
        raise SandboxCrashed(f"the program's process answers nonsense: {error}") from error


def _why(code: int | None) -> str:
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            return signal.Signals(-code).name
    return f"exit status {code}"


def _failure(told: Any) -> DomainError:
    if not isinstance(told, list) or len(told) != 2 or not all(isinstance(t, str) for t in told):
        raise BadFrame("an error has a code and a text")
    code, text = told
    kind, detail = CODES.get(code, ProgramFailed), plain_text(text)
    if issubclass(kind, Invalid):
        fault = {"pointer": "/model_input", "code": "invalid", "detail": detail[:300]}
        return kind(detail, errors=[fault])
    return kind(detail, code="BATCH_NORM_FIXED" if code == "BATCH_NORM_FIXED" else None)


def plain_text(text: str) -> str:
    """A program's error text for a user: printable, without this server's folders; its end, if it is long.

    Of a traceback, as TorchScript adds one, the reason comes first.
    """
    text = PATHS.sub("", UNPRINTABLE.sub(" ", text)).strip()
    reasons = [found.start() for found in REASON.finditer(text)]
    if "Traceback" in text and reasons:
        text = f"{text[reasons[-1] :]}\n{text[: reasons[-1]]}".strip()
        return text if len(text) <= TEXT else text[:TEXT] + " …"
    return text if len(text) <= TEXT else "… " + text[-TEXT:]


def _layers(ended: dict[str, Any]) -> int:
    """How many BatchNorm layers the child says it has calibrated."""
    norms = ended.get("norms")
    if type(norms) is not int or norms < 0:
        raise BadFrame("a number of layers was expected")
    return norms


def _protections(hello: dict[str, Any]) -> dict[str, str]:
    """What the child says it has given up. It says so before it has seen the program."""
    found = hello.get("hello")
    if not isinstance(found, dict) or len(found) > 32:
        raise BadFrame("no hello")
    return {str(name)[:40]: str(told)[:200] for name, told in found.items()}


def _request(inputs: tuple[RawTensor, ...], plan: Plan, settings: Settings) -> dict[str, Any]:
    return {
        "op": "predict",
        "plan": type(plan).__name__.lower(),
        "seed": plan.seed,
        "draws": plan.draws if isinstance(plan, Dropout) else 1,
        "inputs": len(inputs),
        "calibration": [len(b) for b in plan.calibration] if isinstance(plan, Drawn) else [],
        "device": settings.device,
    }


def _sent(inputs: tuple[RawTensor, ...], plan: Plan) -> list[RawTensor]:
    batches = plan.calibration if isinstance(plan, Drawn) else ()
    return [*inputs, *(tensor for batch in batches for tensor in batch)]


def _environment(settings: Settings) -> dict[str, str]:
    """All that the child knows of this machine: where code lies, how many threads, no home, no secrets."""
    threads = str(settings.threads)
    return {
        "PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PATH": "/nonexistent",
        "HOME": "/nonexistent",
        "LC_ALL": "C.UTF-8",
        "OMP_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": "1",  # numpy's, which would start while files are still open
        "MKL_NUM_THREADS": threads,
        **settings.environment,
    }
