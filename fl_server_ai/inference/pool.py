"""This process's sandbox: made at the first question, on a thread that stays."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from django.conf import settings

from fl_server_ai.containers import Limits
from fl_server_ai.inference import files
from fl_server_ai.sandbox.descriptions import Description
from fl_server_ai.sandbox.parent import SandboxPool
from fl_server_ai.sandbox.plans import Plan
from fl_server_ai.sandbox.preparation import Preparation
from fl_server_ai.sandbox.programs import Program
from fl_server_ai.sandbox.tensors import RawTensor


class Sandbox:
    """A `SandboxPool` and its own thread: a child ends with the thread that started it."""

    def __init__(self) -> None:
        self.owner = os.getpid()  # threads don't survive a fork
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sandbox")
        self._pool = SandboxPool(
            children=settings.FL_INFERENCE_CHILDREN,
            memory=settings.FL_INFERENCE_MEMORY,
            threads=settings.FL_INFERENCE_THREADS,
            device=settings.FL_INFERENCE_DEVICE,
            # Threads that spin while there is nothing to do take the processor from everybody else.
            environment={"OMP_WAIT_POLICY": "PASSIVE"},
            limits=Limits(file_bytes=settings.FL_MAX_MODEL_BYTES),
        )

    def predict(
        self, program: Program, tensor: RawTensor, plan: Plan, preparation: Preparation
    ) -> list[RawTensor]:
        """One tensor per draw; `SandboxPool.predict` says what it raises."""
        timeout = settings.FL_INFERENCE_SECONDS
        asked = self._thread.submit(
            self._pool.predict, program, [tensor], plan, timeout=timeout, preparation=preparation
        )
        return asked.result()

    def describe(self, program: Program, shape: Sequence[int] | None) -> Description:
        """Its layers; `SandboxPool.describe` says what it raises."""
        timeout = settings.FL_INFERENCE_SECONDS
        return self._thread.submit(self._pool.describe, program, shape, timeout=timeout).result()

    def close(self) -> None:
        self._pool.__exit__(None, None, None)
        self._thread.shutdown()


_sandboxes: list[Sandbox] = []


def predict(
    program: Program, tensor: RawTensor, plan: Plan, preparation: Preparation
) -> Sequence[RawTensor]:
    """Ask the sandbox of this process; from one thread at a time."""
    return _sandbox().predict(program, tensor, plan, preparation)


def describe(program: Program, shape: Sequence[int] | None) -> Description:
    """Ask the sandbox of this process what a program is made of; from one thread at a time."""
    return _sandbox().describe(program, shape)


def _sandbox() -> Sandbox:
    if not _sandboxes or _sandboxes[0].owner != os.getpid():
        _sandboxes[:] = [Sandbox()]
    return _sandboxes[0]


def close() -> None:
    """End all children and let go of their files; the next question starts new ones."""
    files.close()
    while _sandboxes:
        _sandboxes.pop().close()
