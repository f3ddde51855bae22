"""Where the arithmetic happens: CPU or GPU, and on how many threads."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

MAX_THREADS = 4  # more only wait for memory
_lock = threading.Lock()
_inside = 0
_before = 0


def resolve(wanted: str) -> tuple[torch.device, list[str]]:
    """The device for "auto", "cpu", "cuda" or "cuda:1", and a warning if it cannot be had.

    "auto" takes a GPU if there is one and says nothing if not. Raises ValueError for anything else.
    """
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu"), []
    name, _, number = wanted.partition(":")
    if name not in ("cpu", "cuda") or (number and not number.isdigit()) or wanted.endswith(":"):
        raise ValueError(f"no such device: {wanted!r} (auto, cpu, cuda or cuda:<n>)")
    if name == "cuda" and int(number or 0) >= torch.cuda.device_count():
        return torch.device("cpu"), [f"{wanted} is not available; aggregated on the CPU"]
    return torch.device(wanted), []


def thread_count(wanted: int | None) -> int:
    """As wanted, or one for each core this process may use, at most four."""
    if wanted is not None:
        return max(1, wanted)
    return min(MAX_THREADS, len(os.sched_getaffinity(0)))


@contextmanager
def single_threaded_torch() -> Iterator[None]:
    """Keep torch from splitting its operations over threads that would compete with ours.

    Process-wide, like the setting; calls may overlap, the last one to leave restores it.
    """
    global _inside, _before
    with _lock:
        if _inside == 0:
            _before = torch.get_num_threads()
            torch.set_num_threads(1)
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                torch.set_num_threads(_before)
