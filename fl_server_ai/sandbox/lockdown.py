"""What the child gives up before it loads a program, in the order that works, and what of that was not to be had.

Each step puts a line under its name into the report: "on", with what it means here, or "off: " and why. The worker
logs them; nothing is missing silently.
"""

import os
import resource
import signal
from collections.abc import Callable
from dataclasses import dataclass

from fl_server_ai.sandbox import landlock, seccomp, system

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
FIRST_UID = 1_600_000_000  # plus the pid: nobody's, and no other child's
THREADS = 128
SLACK = 2**30  # bytes of addresses that threads reserve without using them
GPU_FILES = ("/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/sys/devices/system", "/proc/driver")

Report = dict[str, str]


@dataclass(frozen=True)
class Demands:
    """What the worker asks for. `memory`: bytes beyond what torch has taken when the program comes."""

    memory: int
    cpu_seconds: int
    empty: str  # a directory without anything in it
    device: str

    @property
    def driver(self) -> bool:
        """Whether a GPU's driver must go on working: it needs files, and addresses without end."""
        return self.device != "cpu"


def leave_namespaces(report: Report) -> None:
    """No network device, no shared memory of others. First of all: it needs a process of one thread."""
    die_with_parent()
    flags = CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWNS
    if os.geteuid():
        flags |= CLONE_NEWUSER

    def step() -> str:
        system.unshare(flags)
        return "own network, without devices"

    _try(report, "namespaces", step)


def give_up_files(demands: Demands, report: Report, paths: list[str]) -> None:
    """After all imports, before torch starts threads. A GPU's child may go on reading `paths` (code, libraries)."""
    _try(report, "oom", _first_to_go)
    os.chdir(demands.empty)
    if os.geteuid() == 0 and not demands.driver:
        _try(report, "chroot", lambda: _empty_root(demands.empty))
    else:
        report["chroot"] = "off: a GPU needs files" if demands.driver else "off: not root"
    system.prctl(system.PR_SET_NO_NEW_PRIVS, 1)
    report["no_new_privs"] = "on"

    def rules() -> str:
        others = len(os.listdir("/proc/self/task")) - 1 if os.path.isdir("/proc/self") else 0
        if demands.driver:
            devices = [f"/dev/{n}" for n in os.listdir("/dev") if n.startswith("nvidia")]
            abi = landlock.restrict([*paths, *GPU_FILES], [*devices, "/dev/null"])
        else:
            abi = landlock.restrict()
        return f"ABI {abi}" + (f", but {others} threads were there before" if others else "")

    _try(report, "landlock", rules)
    _try(report, "uid", _own_uid)
    die_with_parent()  # changing the uid undoes it
    system.prctl(system.PR_SET_DUMPABLE, 0)


def give_up_the_rest(demands: Demands, report: Report, statm: int) -> None:
    """When everything that torch needs has run once. `statm` is /proc/self/statm, opened before."""
    _try(report, "limits", lambda: _limit(demands, report, statm))

    def calls() -> str:
        seccomp.restrict(driver=demands.driver)
        return "what reaches out is denied" if demands.driver else "only computing is allowed"

    _try(report, "seccomp", calls)


def die_with_parent() -> None:
    """The kernel ends this process when the worker's thread that started it ends."""
    system.prctl(system.PR_SET_PDEATHSIG, signal.SIGKILL)


def _try(report: Report, name: str, step: Callable[[], str | None]) -> None:
    try:
        told = step()
    except (OSError, ValueError) as error:  # ValueError: of setrlimit
        report[name] = f"off: {error}"
    else:
        report[name] = f"on: {told}" if told else "on"


def _first_to_go() -> None:
    """When memory runs out, the kernel ends the child, never the worker."""
    with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write("1000")


def _empty_root(empty: str) -> str:
    os.chroot(empty)
    os.chdir("/")
    return "an empty directory"


def _own_uid() -> str:
    if os.geteuid():
        raise OSError("not root")
    uid = FIRST_UID + os.getpid()
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    return str(uid)


def _limit(demands: Demands, report: Report, statm: int) -> str:
    alone = report["uid"].startswith("on")
    limits = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CPU: demands.cpu_seconds,
        # Threads count as processes, and all of one uid's are counted: those of others must not stop ours.
        resource.RLIMIT_NPROC: THREADS if alone else 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    if not demands.driver:
        pages = [int(word) for word in os.pread(statm, 200, 0).split()]
        size = resource.getpagesize()
        limits[resource.RLIMIT_AS] = pages[0] * size + demands.memory + SLACK
        limits[resource.RLIMIT_DATA] = pages[5] * size + demands.memory
        limits[resource.RLIMIT_NOFILE] = 0  # what is open stays open
    for kind, value in limits.items():
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))
    return f"{demands.memory >> 20} MiB" if not demands.driver else "no memory limit with a GPU"
