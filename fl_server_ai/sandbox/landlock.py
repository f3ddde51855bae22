"""Landlock: this process and its later threads lose the file system, TCP and signals to others. No root needed."""

import ctypes
import os
import struct
from collections.abc import Iterable

from fl_server_ai.sandbox.system import syscall

CREATE, ADD, RESTRICT = 444, 445, 446  # the same numbers on every machine
VERSION = 1  # flag: which ABI
EXECUTE, WRITE, READ, LIST = 1 << 0, 1 << 1, 1 << 2, 1 << 3
IOCTL = 1 << 15
BELOW = 1  # rule: a path and what is below it


def version() -> int:
    """The kernel's ABI, from 1; OSError without landlock."""
    return syscall(CREATE, None, 0, VERSION)


def restrict(readable: Iterable[str] = (), devices: Iterable[str] = ()) -> int:
    """Deny all opening of files but reading `readable` and using `devices`, and all that the ABI knows besides.

    Needs no_new_privs. Threads that run already are not restricted. Returns the ABI.
    """
    abi = version()
    rights = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)) - 1
    network = 0b11 if abi >= 4 else 0  # bind and connect, TCP
    scopes = 0b11 if abi >= 6 else 0  # abstract sockets and signals
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    attributes = ctypes.create_string_buffer(struct.pack("<QQQ", rights, network, scopes), 24)
    ruleset = syscall(CREATE, attributes, size, 0)
    try:
        for path in readable:
            allowed = (READ | LIST | EXECUTE) if os.path.isdir(path) else (READ | EXECUTE)
            _allow(ruleset, path, allowed & rights)
        for path in devices:
            _allow(ruleset, path, (READ | WRITE | IOCTL) & rights)
        syscall(RESTRICT, ruleset, 0)
    finally:
        os.close(ruleset)
    return abi


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        rule = ctypes.create_string_buffer(struct.pack("<Qi", rights, place), 12)
        syscall(ADD, ruleset, BELOW, rule, 0)
    finally:
        os.close(place)
