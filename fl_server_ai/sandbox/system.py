"""System calls that Python has no function for, by number."""

import ctypes
import os
import platform

LIBC = ctypes.CDLL(None, use_errno=True)
MACHINE = platform.machine()
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 1, 4, 38


def syscall(number: int, *arguments: object) -> int:
    """The call's result; OSError if it failed. Integers are passed as longs."""
    words = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return checked(LIBC.syscall(ctypes.c_long(number), *words))


def prctl(option: int, value: int) -> None:
    """Set `option` of this process."""
    checked(LIBC.prctl(option, ctypes.c_ulong(value), 0, 0, 0))


def unshare(flags: int) -> None:
    """Leave the namespaces of `flags` for new ones. The process must have one thread."""
    checked(LIBC.unshare(flags))


def checked(result: int) -> int:
    """The result, unless it is the -1 that stands for an error."""
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
