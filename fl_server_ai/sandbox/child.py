"""The child: imports torch, locks itself up, loads one program, and answers requests until the pipe ends.

Started by `process.py` with `python -m`, its demands as JSON in argv[1]. Standard input and output are the pipes;
TorchScript's `print` goes nowhere.
"""

import json
import os
import sys
from collections.abc import Iterable
from typing import Any, BinaryIO

from fl_server_ai.sandbox import lockdown
from fl_server_ai.sandbox.pipes import Pipes, Refusal

MEMORY_TEXTS = ("allocate memory", "out of memory", "bad_alloc", "Cannot allocate memory")


def lock(config: dict[str, Any], pipes: Pipes, program: int) -> lockdown.Report:
    """Import torch, then give up everything; the report says what that was."""
    demands = lockdown.Demands(**config["demands"])
    report: lockdown.Report = {}
    close_others([*pipes.kept, program])
    lockdown.leave_namespaces(report)
    from fl_server_ai.sandbox.warming import prepare, warm_up

    kind = config["kind"]
    saved = prepare(kind, demands.device)
    statm = os.open("/proc/self/statm", os.O_RDONLY)
    lockdown.give_up_files(demands, report, [sys.prefix, sys.base_prefix, *sys.path])
    warm_up(kind, demands.device, demands.memory, config["threads"], saved)
    pipes.silence()
    lockdown.give_up_the_rest(demands, report, statm)
    os.close(statm)
    return report


def close_others(kept: Iterable[int]) -> None:
    """Close every file descriptor but these."""
    last = 2
    for fd in [*sorted(set(kept) - {0, 1, 2}), os.sysconf("SC_OPEN_MAX")]:
        os.closerange(last + 1, fd)
        last = fd


def main() -> None:
    config = json.loads(sys.argv[1])
    pipes = Pipes()
    file = open(config["program"], "rb", closefd=False)  # noqa: SIM115 - as long as the process
    report = lock(config, pipes, config["program"])
    pipes.send({"hello": report})
    serve(config, pipes, file)


def serve(config: dict[str, Any], pipes: Pipes, file: BinaryIO) -> None:
    """Load the program when asked to, then predict as often as asked to."""
    from fl_server_ai.sandbox.describing import describe
    from fl_server_ai.sandbox.drawing import predict
    from fl_server_ai.sandbox.loading import load
    from fl_server_ai.sandbox.preparing import before_of

    model, before = None, None
    while True:
        header, tensors = pipes.receive()
        try:
            if model is None:
                before = before_of(tensors)
                model = load(config["kind"], file, config["demands"]["device"])
                pipes.send({"loaded": True})
                continue
            if header["op"] == "describe":
                describe(model, header["shape"], pipes)
            elif header["op"] == "predict":
                predict(model, header, _ready(header, tensors, before), pipes)
            # Anything else: weights for a plan that has failed already.
        except Exception as error:  # noqa: BLE001 - whatever a program raises, it is told to the worker
            pipes.send({"error": told(error)})
        if model is not None and model.changed():
            model = load(config["kind"], file, config["demands"]["device"])


def _ready(header: dict[str, Any], tensors: list[Any], before: Any) -> list[Any]:
    """Inputs, then batches for calibration, which are never images, as the program is to see them."""
    from fl_server_ai.sandbox.preparing import prepared

    count, batch = header["inputs"], header["preparation"] | {"image": False}
    inputs = prepared(header["preparation"], tensors[:count], before)
    return inputs + [ready for t in tensors[count:] for ready in prepared(batch, [t], before)]


def told(error: Exception) -> list[str]:
    """Code and text of an error. Never raises: the error's own text may be the program's."""
    code = error.code if isinstance(error, Refusal) else "PROGRAM_FAILED"
    text = str(error)
    if isinstance(error, MemoryError) or any(words in text for words in MEMORY_TEXTS):
        code = "SANDBOX_MEMORY"
    text = text if isinstance(error, Refusal) else f"{type(error).__name__}: {text}"
    return [code, text[-4000:].encode("utf-8", "replace").decode()]


if __name__ == "__main__":
    main()
