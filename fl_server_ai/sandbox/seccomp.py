"""seccomp: which system calls the child may still make, on all its threads, until it ends.

On the CPU: computing, memory, threads and its open pipes, nothing else; all others fail with EPERM. With a GPU the
driver needs files and ioctl, so that there only what reaches out is taken away.
"""

import ctypes
import os
import struct

from fl_server_ai.sandbox.system import MACHINE, syscall

ALLOW, ERRNO, KILL = 0x7FFF0000, 0x00050000, 0x80000000
EPERM, ENOSYS = 1, 38
LOAD, EQUAL, ANY_BIT, RETURN = 0x20, 0x15, 0x45, 0x06  # BPF: ld [k], jeq, jset, ret
NR, ARCH, ARGUMENT = 0, 4, 16  # offsets in seccomp_data; an argument has 8 bytes
CLONE_THREAD = 0x10000
PR_SET_NAME = 15
SET_FILTER, ALL_THREADS = 1, 1

# Name: number on x86_64, on aarch64 (None: not there).
COMPUTING: dict[str, tuple[int | None, int | None]] = {
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67),
    "close": (3, 57), "fstat": (5, 80), "lseek": (8, 62), "mmap": (9, 222), "mprotect": (10, 226),
    "munmap": (11, 215), "brk": (12, 214), "mremap": (25, 216), "madvise": (28, 233),
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132), "restart_syscall": (219, 128), "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123), "sched_setaffinity": (203, 122), "nanosleep": (35, 101),
    "clock_nanosleep": (230, 115), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "gettimeofday": (96, 169), "time": (201, None), "futex": (202, 98), "futex_waitv": (449, 449),
    "set_robust_list": (273, 99), "rseq": (334, 293), "set_tid_address": (218, 96),
    "membarrier": (324, 283), "getpid": (39, 172), "gettid": (186, 178), "getcpu": (309, 168),
    "getuid": (102, 174), "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177),
    "getrandom": (318, 278), "getrusage": (98, 165), "sysinfo": (99, 179), "uname": (63, 160),
    "exit": (60, 93), "exit_group": (231, 94),
}  # fmt: skip
# What reaches beyond the process; taken away where the rest must stay for a driver.
REACHING: dict[str, tuple[int | None, int | None]] = {
    "socket": (41, 198), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201),
    "accept": (43, 202), "accept4": (288, 242), "sendto": (44, 206), "sendmsg": (46, 211),
    "sendmmsg": (307, 269), "fork": (57, None), "vfork": (58, None), "execve": (59, 221),
    "execveat": (322, 281), "kill": (62, 129), "tkill": (200, 130), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "unshare": (272, 97), "setns": (308, 268), "bpf": (321, 280), "userfaultfd": (323, 282),
    "perf_event_open": (298, 241), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427), "keyctl": (250, 219), "add_key": (248, 217),
    "request_key": (249, 218), "unlink": (87, None), "unlinkat": (263, 35), "rename": (82, None),
    "renameat": (264, 38), "renameat2": (316, 276), "mkdir": (83, None), "mkdirat": (258, 34),
    "link": (86, None), "linkat": (265, 37), "symlink": (88, None), "symlinkat": (266, 36),
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "chown": (92, None),
    "fchown": (93, 55), "fchownat": (260, 54), "truncate": (76, 45), "mknodat": (259, 33),
    "open_by_handle_at": (304, 265), "memfd_create": (319, 279),
}  # fmt: skip
CLONE, CLONE3, TGKILL, PRCTL, PRLIMIT = (56, 220), (435, 435), (234, 131), (157, 167), (302, 261)
FILTER = (317, 277)
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}


def restrict(*, driver: bool = False) -> None:
    """From now on, on every thread. OSError where the kernel has no seccomp, or for an unknown machine."""
    if MACHINE not in ARCHITECTURES:
        raise OSError(ENOSYS, f"no table of system calls for {MACHINE}")
    column, architecture = ARCHITECTURES[MACHINE]
    program = [
        (LOAD, 0, 0, ARCH),
        (EQUAL, 1, 0, architecture),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NR),
        *_returns(
            [CLONE3[column]], ERRNO | ENOSYS
        ),  # so that libc takes clone, whose flags can be seen
        *_if(CLONE[column], 0, ANY_BIT, CLONE_THREAD),
        *_if(TGKILL[column], 0, EQUAL, os.getpid()),  # abort() signals its own thread
    ]
    if driver:
        if MACHINE == "x86_64":  # the second numbering of all calls, which no table above has
            program += [(0x35, 0, 1, 0x40000000), (RETURN, 0, 0, ERRNO | EPERM)]  # jge
        program += _returns([c[column] for c in REACHING.values()], ERRNO | EPERM)
        program.append((RETURN, 0, 0, ALLOW))
    else:
        program += _if(PRCTL[column], 0, EQUAL, PR_SET_NAME)
        program += _if(PRLIMIT[column], 2, EQUAL, 0)  # asked, not set
        program += _returns([c[column] for c in COMPUTING.values()], ALLOW)
        program.append((RETURN, 0, 0, ERRNO | EPERM))
    code = b"".join(struct.pack("<HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    head = struct.pack("<HxxxxxxQ", len(program), ctypes.addressof(buffer))
    syscall(FILTER[column], SET_FILTER, ALL_THREADS, ctypes.create_string_buffer(head, len(head)))


Instruction = tuple[int, int, int, int]


def _returns(numbers: list[int | None], action: int) -> list[Instruction]:
    found: list[Instruction] = []
    for number in numbers:
        if number is not None:
            found += [(EQUAL, 0, 1, number), (RETURN, 0, 0, action)]
    return found


def _if(number: int, argument: int, test: int, value: int) -> list[Instruction]:
    """Allow the call if its argument's low word passes the test (and the high word is 0), else EPERM."""
    offset = ARGUMENT + 8 * argument
    return [
        (EQUAL, 0, 6, number),
        (LOAD, 0, 0, offset),
        (test, 0, 3, value),
        (LOAD, 0, 0, offset + 4),
        (EQUAL, 0, 1, 0),
        (RETURN, 0, 0, ALLOW),
        (RETURN, 0, 0, ERRNO | EPERM),
    ]
