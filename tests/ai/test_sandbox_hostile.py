"""Hostile programs are refused or ended with a clear error; nothing is touched, and the next request is answered."""

import contextlib
import os
import signal
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fl_server_ai.containers.torch_archive.exports import PickledEntry
from fl_server_ai.containers.torch_archive.scripts import ForbiddenOperator
from fl_server_ai.sandbox.errors import (
    ProgramFailed,
    SandboxCrashed,
    SandboxMemory,
    SandboxTimeout,
    SandboxUnavailable,
)
from fl_server_ai.sandbox.parent import SandboxPool
from fl_server_ai.sandbox.plans import Drawn, Dropout, Plain
from fl_server_ai.sandbox.preparation import Preparation
from fl_server_ai.sandbox.process import Child, Settings
from fl_server_ai.sandbox.programs import Program
from fl_server_ai.sandbox.tensors import RawTensor
from fl_server_core.exceptions import DomainError
from tests.ai.test_sandbox import images, network, program, raw, values
from tests.ai.test_sandbox_exported import CONFIG, exported, replaced
from tests.ai.torch_files import scripted

MEMORY = 2**30
STAND_INS = "tests.ai.test_sandbox_lockdown"


@pytest.fixture(scope="module")
def pool() -> Iterator[SandboxPool]:
    with SandboxPool(threads=1, memory=MEMORY, output=2**26) as pool:
        yield pool


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Program:
    return program(network(), tmp_path_factory.mktemp("honest"))


@pytest.fixture
def next_is_answered(pool: SandboxPool, honest: Program) -> Iterator[None]:
    """Whatever the test did, this worker goes on."""
    yield
    (output,) = pool.predict(honest, [raw(images())], Plain())
    torch.testing.assert_close(values(output), network()(images()))


class Same(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def with_line(path: Path, line: str) -> Program:
    """`Same` with a line of TorchScript before its return, put there by hand."""
    scripted(Same(), path)
    with zipfile.ZipFile(path) as old:
        entries = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w") as new:
        for name, data in entries.items():
            if name.endswith(".py"):
                assert b"    return x" in data
                data = data.replace(b"    return x", f"    {line}\n    return x".encode())
            new.writestr(name, data)
    return Program(path, str(path), "torchscript")


def unchecked(program: Program, empty: Path) -> Child:
    """A child for a program that no check has seen."""
    child = Child(program, Settings(MEMORY, 2**26, 1, "cpu"), empty)
    child.load(time.monotonic() + 30)
    return child


@pytest.mark.usefixtures("next_is_answered")
@pytest.mark.parametrize(
    "line",
    [
        'torch.save(x, "{}")',
        'y = torch.from_file("/etc/passwd", None, 10, dtype=0)',
        'o = ops.aten\n    o.save(x, "{}")',
    ],
)
def test_files_are_refused_before_loading(pool: SandboxPool, tmp_path: Path, line: str) -> None:
    hostile = with_line(tmp_path / "m.pt", line.format(tmp_path / "written"))

    with pytest.raises(ForbiddenOperator) as caught:
        pool.predict(hostile, [raw(images())], Plain())

    assert caught.value.error_code == "FORBIDDEN_OPERATOR"
    assert not (tmp_path / "written").exists()


@pytest.mark.usefixtures("next_is_answered")
@pytest.mark.parametrize(
    "line",
    [
        'torch.save(x, "{}/written")',
        'x = torch.from_file("/etc/passwd", None, 10, dtype=0)',
        'x = torch.from_file("{}/readable", None, 10, dtype=0)',
        'x = torch.from_file("/dev/shm/written", True, 10, dtype=0)',
        'x = torch.from_file("/proc/self/environ", None, 1, dtype=0)',
    ],
)
def test_a_program_that_no_check_has_seen_reaches_no_file_either(tmp_path: Path, line: str) -> None:
    tmp_path.chmod(0o777)
    (tmp_path / "readable").write_text("0123456789")
    hostile = with_line(tmp_path / "m.pt", line.format(tmp_path))
    (tmp_path / "empty").mkdir()
    child = unchecked(hostile, tmp_path / "empty")
    if not child.protections["seccomp"].startswith("on"):
        child.kill()
        pytest.skip(f"no seccomp here: {child.protections['seccomp']}")

    # torch.save says nothing of a file that it could not open.
    expected = pytest.raises(ProgramFailed) if "from_file" in line else contextlib.nullcontext()
    with expected:
        child.predict((raw(images()),), Plain(), time.monotonic() + 30, Preparation())

    child.kill()
    assert not (tmp_path / "written").exists()
    assert not Path("/dev/shm/written").exists()  # noqa: S108


class Endless(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        while bool(x.sum() < 1e30):
            x = x * 0.5
        return x


@pytest.mark.usefixtures("next_is_answered")
def test_an_endless_loop_is_ended(pool: SandboxPool, tmp_path: Path) -> None:
    endless = program(Endless(), tmp_path)
    pool.predict(endless, [raw(torch.full((1,), 1e31))], Plain())
    pid = pool.pids[-1]

    with pytest.raises(SandboxTimeout) as caught:
        pool.predict(endless, [raw(images())], Plain(), timeout=0.5)

    assert caught.value.error_code == "SANDBOX_TIMEOUT"
    with pytest.raises(ProcessLookupError):  # gone, and no zombie
        os.kill(pid, 0)
    assert pool.predict(endless, [raw(torch.full((1,), 1e31))], Plain())


class Large(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros([100 * 1024 * 1024 * 1024], dtype=torch.uint8)


class Growing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        while x.numel() > 0:
            x = torch.cat([x, x])
        return x


class Long(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros([1]).expand([33_554_432])


@pytest.mark.usefixtures("next_is_answered")
@pytest.mark.parametrize("hostile", [Large, Growing, Long])
def test_memory_is_limited(pool: SandboxPool, tmp_path: Path, hostile: type[nn.Module]) -> None:
    with pytest.raises(SandboxMemory) as caught:
        pool.predict(program(hostile(), tmp_path), [raw(images())], Plain())

    assert caught.value.error_code == "SANDBOX_MEMORY"


@pytest.mark.usefixtures("next_is_answered")
def test_a_child_that_is_killed_from_outside_is_replaced(pool: SandboxPool, tmp_path: Path) -> None:
    same = program(Same(), tmp_path)
    pool.predict(same, [raw(images())], Plain())
    pid = pool.pids[-1]

    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    (output,) = pool.predict(same, [raw(images())], Plain())

    assert torch.equal(values(output), images())
    assert pid not in pool.pids


@pytest.mark.usefixtures("next_is_answered")
@pytest.mark.parametrize(
    ("line", "error"),
    [('"use_pickle": false', PickledEntry), ("torch.ops.aten.linear.default", ForbiddenOperator)],
)
def test_a_hostile_exported_program_is_refused_before_loading(
    pool: SandboxPool, tmp_path: Path, line: str, error: type[DomainError]
) -> None:
    path = exported(tmp_path / "m.pt2")
    replaced(
        path,
        line,
        '"use_pickle": true' if "pickle" in line else "torch.os.system",
        CONFIG if "pickle" in line else "models/model.json",
    )
    children = pool.pids

    with pytest.raises(error):
        pool.predict(Program(path, str(path), "exported"), [raw(torch.ones(1, 3))], Plain())

    assert pool.pids == children


@pytest.mark.usefixtures("next_is_answered")
def test_an_archive_that_torch_cannot_load_is_the_programs_failure(
    pool: SandboxPool, tmp_path: Path
) -> None:
    broken = with_line(tmp_path / "m.pt", "y = x + undefined_name")

    with pytest.raises(ProgramFailed, match="undefined_name"):
        pool.predict(broken, [raw(images())], Plain())


@pytest.mark.usefixtures("next_is_answered")
@pytest.mark.parametrize(
    ("behaviour", "error"),
    [
        ("segfault", SandboxCrashed),
        ("abort", SandboxCrashed),
        ("exit", SandboxCrashed),
        ("garbage", SandboxCrashed),
        ("no json", SandboxCrashed),
        ("long header", SandboxCrashed),
        ("long body", SandboxMemory),
        ("deep header", SandboxCrashed),
        ("wrong size", SandboxCrashed),
        ("unknown dtype", SandboxCrashed),
        ("negative shape", SandboxCrashed),
        ("two tensors", SandboxCrashed),
        ("no tensor", SandboxCrashed),
        ("wrong answer", SandboxCrashed),
        ("strange error", SandboxCrashed),
        ("unknown code", ProgramFailed),
        ("half a frame", SandboxTimeout),
        ("deaf", SandboxTimeout),
        ("out of memory", SandboxMemory),
    ],
)
def test_a_child_that_misbehaves_is_ended(
    honest: Program, behaviour: str, error: type[DomainError]
) -> None:
    settings = {"environment": {"BEHAVIOUR": behaviour}, "entry": STAND_INS}
    with SandboxPool(threads=1, output=2**20, **settings) as pool:  # type: ignore[arg-type]
        large = RawTensor("U8", (2**22,), bytes(2**22))

        with pytest.raises(error) as caught:
            pool.predict(honest, [large], Plain(), timeout=1.0)

        assert caught.value.error_code != "ERROR"
        assert pool.pids == [] or error is ProgramFailed


@pytest.mark.usefixtures("next_is_answered")
def test_a_child_that_does_not_start_is_the_servers_fault(honest: Program) -> None:
    with SandboxPool(entry="no.such.module") as pool, pytest.raises(SandboxUnavailable):
        pool.predict(honest, [raw(images())], Plain())


@pytest.mark.usefixtures("next_is_answered")
def test_a_child_that_speaks_unasked_is_not_asked(honest: Program) -> None:
    settings = {"environment": {"BEHAVIOUR": "talkative"}, "entry": STAND_INS}
    with SandboxPool(threads=1, **settings) as pool:  # type: ignore[arg-type]
        pool.predict(honest, [raw(images())], Plain())
        first = pool.pids
        time.sleep(0.2)

        pool.predict(honest, [raw(images())], Plain())

        assert pool.pids != first


@pytest.mark.usefixtures("next_is_answered")
def test_a_timeout_counts_all_draws(pool: SandboxPool, honest: Program) -> None:
    def slow() -> Iterator[list[RawTensor]]:
        while True:
            time.sleep(0.05)
            yield []

    with pytest.raises(SandboxTimeout):
        pool.predict(honest, [raw(images())], Drawn(slow), timeout=0.5)
    with pytest.raises(SandboxTimeout):
        pool.predict(honest, [raw(images(2000))], Dropout(10_000), timeout=0.5)
