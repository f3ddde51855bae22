"""Reads files in a process of its own, and says of each what happened besides.

Paths come in as JSON on the first line of standard input; a JSON line goes out for each. An audit hook sees
whatever Python opens, imports, compiles, runs or connects to.
"""

import ast
import contextlib
import ctypes
import gc
import importlib
import io
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

LIBC = ctypes.CDLL(None)
SECONDS = 20  # a guard against endless loops, not a measurement
ADDRESS_SPACE = 4 * 2**30  # bytes; what wants more gets a MemoryError, not the machine
# Of files and memory, and looking at frames (the hook itself does).
HARMLESS = frozenset(
    [
        "sys._getframe", "mmap.__new__", "tempfile.mkstemp", "gc.collect", "_thread.start_new_thread",
        "object.__getattr__", "object.__setattr__", "object.__delattr__",
    ]
)  # fmt: skip
ON_PATHS = frozenset({"open", "os.remove", "os.link", "os.rename", "os.truncate"})


class Hangs(BaseException):
    """Not an Exception, so that no handler in the reader takes it for one of its own."""


class Watch:
    """An audit hook that is on while `folder` is set; only what lies in there may be touched."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.events: list[str] = []

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        folder, self.folder = self.folder, None  # nothing that is done here counts
        if folder is None:
            return
        try:
            if not (event in HARMLESS or self._allowed(event, arguments, folder)):
                self.events.append(f"{event} {str(arguments)[:200]}")
        finally:
            self.folder = folder

    def _allowed(self, event: str, arguments: tuple[Any, ...], folder: Path) -> bool:
        if event in ON_PATHS:
            paths = arguments[:2] if event in {"os.link", "os.rename"} else arguments[:1]
            return all(_within(path, folder) for path in paths)
        return event == "compile" and _parses_a_literal()


def _within(path: Any, folder: Path) -> bool:
    """The folder itself too: a file that never has a name is opened by its folder's."""
    if isinstance(path, int):  # a descriptor that is open already
        return True
    return Path(os.path.realpath(os.fsdecode(path))).is_relative_to(folder)


def _parses_a_literal() -> bool:
    """Whether it is `ast.literal_eval` that compiles: into a syntax tree, which is no code.

    The event does not say the flags, so they are read from the frame of `ast.parse`.
    """
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_code is not ast.parse.__code__:
        frame = frame.f_back
    caller = frame.f_back
    return (
        frame.f_code is ast.parse.__code__
        and bool(frame.f_locals["flags"] & ast.PyCF_ONLY_AST)
        and caller is not None
        and caller.f_code is ast.literal_eval.__code__
    )


def _memory(kind: str) -> int:
    """VmRSS or VmHWM, in bytes."""
    found = re.search(rf"^{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) * 1024


def _stop(*_: object) -> None:
    raise Hangs


def read(path: Path, watch: Watch) -> dict[str, Any]:
    """What comes of one file; `grown` is the peak of the resident memory above that before."""
    from fl_server_ai.containers import extract
    from fl_server_core.exceptions import DomainError

    target = path.parent / "target"
    watch.events = []
    gc.collect()
    LIBC.malloc_trim(0)  # what an earlier file left would hide what this one takes
    Path("/proc/self/clear_refs").write_text("5")
    before, began = _memory("VmRSS"), time.monotonic()
    code = error = None
    signal.alarm(SECONDS)
    watch.folder = path.parent
    try:
        extract(path, target)
    except DomainError as refusal:
        code, error = refusal.error_code, refusal.detail
    except Hangs:
        error = f"more than {SECONDS} s"
    except Exception as failure:  # noqa: BLE001  whatever else it is, the test names it
        error = f"{type(failure).__name__}: {str(failure)[:300]}"
    else:
        error = "accepted"
    finally:
        watch.folder = None
        signal.alarm(0)
    return {
        "code": code,
        "error": error,
        "grown": _memory("VmHWM") - before,
        "seconds": time.monotonic() - began,
        "events": watch.events,
        "left": sorted(str(p.name) for p in path.parent.iterdir() if p != path),
    }


def warm_up(folder: Path) -> None:
    """Whatever Python imports when it is first needed, it imports now."""
    from fl_server_ai.containers import extract, template_ties
    from fl_server_core.exceptions import DomainError
    from tests.ai.hostile import HONEST

    for name in ("cp437", "latin_1", "ascii", "raw_unicode_escape", "unicode_escape", "utf_8"):
        importlib.import_module(f"encodings.{name}")
    for name in (
        "copyreg",
        "encodings.idna",
        "concurrent.futures.thread",
        "pickletools",
        "zoneinfo",
    ):
        importlib.import_module(name)
    for index, build in enumerate(HONEST.values()):
        place = folder / f"honest-{index}"
        place.mkdir()
        source = place / "source"
        source.write_bytes(build())
        with contextlib.suppress(DomainError):  # a test of its own says that it is refused
            found = extract(source, place / "target")
            if source.exists():
                template_ties(found.container, source)


def misbehave(watch: Watch, folder: Path) -> list[str]:
    """What the hook must see if it sees anything."""
    watch.events = []
    watch.folder = folder
    with open("/etc/hostname", "rb"):
        pass
    __import__("colorsys")
    eval(compile("1 + 1", "text", "eval"))  # noqa: S307
    ast.literal_eval("(1, 2)")
    os.system("true")  # noqa: S605
    subprocess.run(["true"], check=True)
    socket.socket().close()
    io.open_code(__file__).close()
    ctypes.CDLL(None)
    watch.folder = None
    return watch.events


def answer(found: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(found) + "\n")
    sys.stdout.flush()


def main() -> None:
    job = json.loads(sys.stdin.readline())
    folder = Path(job["folder"])
    warm_up(folder)
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    signal.signal(signal.SIGALRM, _stop)
    watch = Watch()
    sys.addaudithook(watch)
    for path in map(Path, job["files"]):
        answer({"path": str(path), **read(path, watch)})
    answer({"control": misbehave(watch, folder)})


if __name__ == "__main__":
    main()
