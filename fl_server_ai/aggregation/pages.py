"""Memory of the system for the largest buffers that threads keep: all of it goes back when they end.

What `malloc` is given back it may keep, and in as many arenas as there are threads: that was as much again as the
buffers, and another amount each time.
"""

import mmap
from contextlib import suppress

import torch
from torch import Tensor


def room(nbytes: int, device: torch.device) -> Tensor:
    """(nbytes,) uint8 with anything in it."""
    if device.type != "cpu":
        return torch.empty(nbytes, dtype=torch.uint8, device=device)
    made = mmap.mmap(-1, max(1, nbytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # huge pages where the system has some: each page costs a fault
        made.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(made, dtype=torch.uint8)[:nbytes]
