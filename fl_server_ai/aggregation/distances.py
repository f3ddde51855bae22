"""Squared distances between a few updates, for rules that need nothing else of them (Krum, Bulyan).

Differences are taken before they are squared, so float32 loses no more than about 1e-5 of a distance however
near two updates are to each other, and costs half of what float64 does. Chunks whose squares
overflow or vanish there are done again in float64.
"""

import functools
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from fl_server_ai.aggregation.blocks import Run, Source
from fl_server_ai.aggregation.compiled import kernels, worth
from fl_server_ai.aggregation.fold import Folder
from fl_server_ai.aggregation.gram import STRIPES, Stripe, block_length, by_stripe, stripes

FEW = 48  # updates; of more, the Gram matrix is faster
CHUNK = 8192  # numbers, fixed like the blocks: the bytes of the result depend on it
RANGE = (1e-10, 1e18)  # lengths whose squares are normal float32


def suffices(floats: Sequence[Run], updates: int, device: torch.device) -> bool:
    """Whether this is the better way: few updates, on a CPU, in at most 32 bits."""
    return updates <= FEW and device.type == "cpu" and all(run.dtype != "F64" for run in floats)


class DistanceWorker:
    """The buffers of one thread."""

    def __init__(self, device: torch.device, updates: int, loops: ModuleType | None = None) -> None:
        self.folder = Folder(device, block_length(updates), 4)
        self._rows = torch.empty(updates * CHUNK, dtype=torch.float32)
        self._loops = loops

    def partial(self, sources: Sequence[Source], stripe: Stripe) -> Tensor:
        """(n, n) float64: minus half the squared distances over one stripe.

        That is a Gram matrix as far as distances go: g_ii + g_jj - 2 g_ij is the squared distance.
        """
        n = len(sources)
        total = torch.zeros(n * (n - 1) // 2, dtype=torch.float64)
        for run, start, count in stripe:
            block = self.folder.matrix(sources, run, start, count)
            if self._loops is not None and run.dtype == "F32":
                squared = torch.zeros_like(total)
                self._loops.add_distances(block.numpy(), squared.numpy())
                if bool(torch.isfinite(squared).all()):
                    total += squared
                    continue
            for first in range(0, count, CHUNK):
                part = block[:, first : first + CHUNK]
                rows = self._rows[: part.numel()].view(n, -1).copy_(part)
                lengths = torch.pdist(rows)
                if not bool(((lengths > RANGE[0]) & (lengths < RANGE[1])).all()):
                    lengths = torch.pdist(rows.double())
                total += lengths.double().square_()
        above = torch.triu_indices(n, n, offset=1)
        half = torch.zeros((n, n), dtype=torch.float64)
        half[above[0], above[1]] = -total / 2
        return half + half.T


def partial_distances(
    sources: Sequence[Source],
    device: torch.device,
    floats: Sequence[Run],
    threads: int,
    chosen: Sequence[int] = range(STRIPES),
) -> dict[int, Tensor]:
    """The same for each chosen stripe, in one pass over what belongs to those."""

    n = len(sources)
    # By the round, not by what the process has loaded before: a second worker must come to the same.
    loops = kernels() if worth(sum(run.count for run in floats) * n) else None

    def member() -> Callable[[Stripe], Tensor]:
        return functools.partial(DistanceWorker(device, n, loops).partial, sources)

    return by_stripe(member, stripes(floats, len(sources)), threads, chosen)
