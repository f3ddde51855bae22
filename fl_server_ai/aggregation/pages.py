"""Memory of the system for large buffers that threads keep: all of it goes back when they end.

What `malloc` is given back it may keep, and in as many arenas as there are threads: that was as much again as the
buffers, and another amount each time.
"""

import mmap

import torch
from torch import Tensor


def host_room(nbytes: int) -> Tensor:
    """(nbytes,) uint8 of zeros in main memory, at the beginning of a page."""
    return torch.frombuffer(mmap.mmap(-1, max(1, nbytes)), dtype=torch.uint8)[:nbytes]


def room(nbytes: int, device: torch.device) -> Tensor:
    """The same, or (nbytes,) of anything on another device."""
    if device.type == "cpu":
        return host_room(nbytes)
    return torch.empty(nbytes, dtype=torch.uint8, device=device)
