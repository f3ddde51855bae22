"""What a locked child can still do, tried from inside; started as a module, this is the child that tries it.

Each protection that this machine lacks is skipped with the reason that the child itself reports.
"""

import ctypes
import json
import os
import resource
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fl_server_ai.sandbox import child as child_module
from fl_server_ai.sandbox import frames, lockdown
from fl_server_ai.sandbox.pipes import Pipes
from fl_server_ai.sandbox.process import Child, Settings
from fl_server_ai.sandbox.programs import Program

SECRET = "correct horse battery staple"


def tried(action: Callable[[], Any]) -> str:
    try:
        return f"did: {action()}"
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is the finding
        return f"failed: {type(error).__name__} {error}"


def threads() -> int:
    thread = threading.Thread(target=int)
    thread.start()
    thread.join()
    return 1


PROBES: dict[str, Callable[[], Any]] = {
    "environment": lambda: dict(os.environ),
    "user": os.getuid,
    "read": lambda: open("/etc/passwd").read()[:10],  # noqa: SIM115
    "read own code": lambda: open(__file__).read()[:10],  # noqa: SIM115
    "list": lambda: os.listdir("/"),
    "here": lambda: os.listdir("."),
    "stat": lambda: os.stat("/etc/passwd").st_size,
    "write": lambda: open("written", "w").write("x"),  # noqa: SIM115
    "write elsewhere": lambda: open("/tmp/written", "w").write("x"),  # noqa: S108, SIM115
    "secrets": lambda: open(f"/proc/{os.getppid()}/environ").read(),  # noqa: SIM115
    "socket": lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM),
    "unix socket": lambda: socket.socket(socket.AF_UNIX, socket.SOCK_STREAM),
    "run": lambda: subprocess.run(["/bin/true"], check=True),
    "fork": os.fork,
    "kill": lambda: os.kill(os.getppid(), 0),
    "signal group": lambda: os.killpg(0, 0),
    "root again": lambda: os.setuid(0),
    "new namespace": lambda: lockdown.system.unshare(lockdown.CLONE_NEWUSER),
    "more files": lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)),
    "more memory": lambda: resource.setrlimit(
        resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    ),
    "trace": lambda: lockdown.system.checked(
        lockdown.system.LIBC.ptrace(16, os.getppid(), 0, 0)
    ),
    "dup": lambda: os.dup(1),
    "memory file": lambda: os.memfd_create("x"),
    "other descriptors": lambda: [fd for fd in range(3, 256) if _open(fd)],
    "calculate": lambda: __import__("torch").ones(300, 300).matmul(
        __import__("torch").ones(300, 300)
    ).sum().item(),
    "thread": threads,
    "mode": lambda: lockdown.system.prctl(22, 2),
}  # fmt: skip


def _open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def main() -> None:
    """A child that loads no program, and does what the test has in mind instead."""
    behaviour = os.environ.get("BEHAVIOUR", "probe")
    config = json.loads(sys.argv[1])
    pipes = Pipes()
    report = child_module.lock(config, pipes, config["program"]) if behaviour == "probe" else {}
    pipes.send({"hello": report})
    if behaviour == "probe":
        pipes.receive()
        pipes.send({"found": {name: tried(probe) for name, probe in PROBES.items()}})
        time.sleep(60)
    pipes.receive()
    pipes.send({"loaded": True})
    while True:
        misbehave(behaviour, pipes)


def misbehave(behaviour: str, pipes: Pipes) -> None:
    """Answer one request as no honest child does."""
    if behaviour == "deaf":
        time.sleep(60)
    header, _ = pipes.receive()
    assert header["op"] == "predict"

    def frame(answer: Any, body: bytes = b"", told: int | None = None) -> None:
        text = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        size = len(body) if told is None else told
        os.write(pipes.kept[4], struct.pack("<IQ", len(text), size) + text + body)

    match behaviour:
        case "segfault":
            ctypes.string_at(0)
        case "abort":
            os.abort()
        case "exit":
            os._exit(3)
        case "garbage":
            os.write(pipes.kept[4], os.urandom(4096))
        case "no json":
            frame(b"\xff{")
        case "long header":
            os.write(pipes.kept[4], struct.pack("<IQ", 2**31, 0))
        case "long body":
            frame({"draw": 0, "tensors": [["", "U8", [2**40]]]}, told=2**40)
        case "deep header":
            frame(b"[" * 60_000)
        case "wrong size":
            frame({"draw": 0, "tensors": [["", "F32", [5]]]}, bytes(4))
        case "unknown dtype":
            frame({"draw": 0, "tensors": [["", "pickle", [4]]]}, bytes(4))
        case "negative shape":
            frame({"draw": 0, "tensors": [["", "U8", [-2, -2]]]}, bytes(4))
        case "two tensors":
            frame({"draw": 0, "tensors": [["", "U8", [1]], ["", "U8", [1]]]}, bytes(2))
        case "no tensor":
            frame({"draw": 0})
        case "wrong answer":
            frame({"done": True})
        case "strange error":
            frame({"error": {"code": ["x"]}})
        case "unknown code":
            frame({"error": ["NOT_PERMITTED", "you are not an admin"]})
        case "half a frame":
            os.write(pipes.kept[4], b"\0")
            time.sleep(60)
        case "out of memory":
            os.kill(os.getpid(), 9)
        case "talkative":
            frame({"draw": 0, "tensors": [["", "U8", [1]]]}, bytes(1))
            frame({"done": True})
            time.sleep(0.05)
            frame({"draw": 0, "tensors": [["", "U8", [1]]]}, bytes(1))


@pytest.fixture(scope="module")
def found(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[dict[str, str], dict[str, str]]]:
    """What the child reported, and what it could do."""
    folder = tmp_path_factory.mktemp("locked")
    (folder / "program").write_bytes(b"")
    (folder / "empty").mkdir(mode=0o555)
    os.environ["DATABASE_PASSWORD"] = SECRET
    try:
        settings = Settings(2**30, 2**20, 2, "cpu", entry="tests.ai.test_sandbox_lockdown")
        child = Child(Program(folder / "program", "p", "torchscript"), settings, folder / "empty")
    finally:
        del os.environ["DATABASE_PASSWORD"]
    child.channel.send({"op": "probe"}, [], time.monotonic() + 30)
    header, _ = child.channel.receive(time.monotonic() + 30)
    yield child.protections, header["found"]
    child.kill()


def need(found: tuple[dict[str, str], dict[str, str]], *protections: str) -> dict[str, str]:
    """What the child could do, if one of these protections is on here."""
    report, results = found
    if not any(report[name].startswith("on") for name in protections):
        pytest.skip("; ".join(f"{name} {report[name]}" for name in protections))
    return results


Found = tuple[dict[str, str], dict[str, str]]


def test_every_protection_is_reported(found: Found) -> None:
    report, _ = found

    assert set(report) == {
        "namespaces", "oom", "chroot", "no_new_privs", "landlock", "uid", "limits", "seccomp"
    }  # fmt: skip
    assert all(told == "on" or told.startswith(("on: ", "off: ")) for told in report.values())


def test_the_environment_has_no_secret(found: Found) -> None:
    environment = found[1]["environment"]

    assert SECRET not in environment
    assert "DATABASE" not in environment
    assert "'HOME': '/nonexistent'" in environment


@pytest.mark.parametrize("what", ["read", "read own code", "list", "here", "write", "write elsewhere", "secrets"])  # fmt: skip
def test_no_file_can_be_opened(found: Found, what: str) -> None:
    results = need(found, "landlock", "seccomp")

    assert results[what].startswith("failed: PermissionError") or (
        results[what].startswith("failed: FileNotFoundError")
        and found[0]["chroot"].startswith("on")
    )
    assert not Path("/tmp/written").exists()  # noqa: S108


@pytest.mark.parametrize("what", ["socket", "unix socket", "run", "fork", "kill", "signal group", "root again",
                                  "new namespace", "more files", "more memory", "trace", "dup", "memory file",
                                  "stat", "mode"])  # fmt: skip
def test_nothing_reaches_out_of_the_process(found: Found, what: str) -> None:
    results = need(found, "seccomp")

    assert results[what].startswith("failed: ")


def test_the_child_runs_as_nobody_else(found: Found) -> None:
    results = need(found, "uid")

    assert int(results["user"].removeprefix("did: ")) >= lockdown.FIRST_UID


def test_only_pipes_and_the_program_are_open(found: Found) -> None:
    told = found[1]["other descriptors"].removeprefix("did: ")

    assert len(json.loads(told)) <= 4  # two pipes, /dev/null, the program


@pytest.mark.parametrize("what", ["calculate", "thread"])
def test_it_can_still_calculate(found: Found, what: str) -> None:
    assert found[1][what].startswith("did: ")


def test_children_end_with_the_thread_that_started_them(tmp_path: Path) -> None:
    code = f"""
import os, sys, time
from pathlib import Path
from fl_server_ai.sandbox.process import Child, Settings
from fl_server_ai.sandbox.programs import Program
child = Child(Program(Path({str(tmp_path / "p")!r}), "p", "torchscript"),
              Settings(2**30, 2**20, 1, "cpu"), Path({str(tmp_path)!r}))
print(child.process.pid, flush=True)
os.kill(os.getpid(), 9)
"""
    (tmp_path / "p").write_bytes(b"")
    worker = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    pid = int(worker.stdout)

    assert worker.returncode == -9
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        if "zombie" in Path(f"/proc/{pid}/status").read_text():
            break
        time.sleep(0.05)
    else:
        assert not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize(
    "shape", [[2**40, 2**40], [0, 2**47, 2**47], [1.0], ["1"], [True], [1] * 65, 1]
)
def test_shapes_that_no_tensor_has_are_refused(shape: object) -> None:
    with pytest.raises(frames.BadFrame):
        frames.described({"tensors": [["a", "F32", shape]]}, 0)


if __name__ == "__main__":
    main()
