"""Inner products of all updates, for rules that compare them (Krum, geometric median, clipping)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fl_server_ai.aggregation.blocks import Run, Source
from fl_server_ai.aggregation.fold import Folder

STRIPES = 8  # partial sums; fixed, so that the result does not depend on the number of threads
BUDGET = 8 << 20  # bytes of float64 rows a thread holds


def block_length(updates: int) -> int:
    """Numbers a block: like the stripes, it depends on nothing but the number of updates."""
    return max(256, min(65_536, BUDGET // (8 * updates)))


def stripes(floats: Sequence[Run], updates: int) -> list[list[tuple[Run, int, int]]]:
    """All float blocks, dealt out to the partial sums."""
    length = block_length(updates)
    blocks = [
        (run, start, min(length, run.count - start))
        for run in floats
        for start in range(0, run.count, length)
    ]
    return [blocks[index::STRIPES] for index in range(STRIPES)]


def partial_gram(
    folder: Folder,
    base: Source,
    sources: Sequence[Source],
    stripe: Sequence[tuple[Run, int, int]],
) -> Tensor:
    """(n, n) float64 on the CPU: products of (update - base) over one stripe."""
    total = torch.zeros((len(sources),) * 2, dtype=torch.float64, device=folder.device)
    for run, start, count in stripe:
        rows = folder.rows([base, *sources], run, start, count).to(torch.float64)
        deltas = rows[1:] - rows[0]
        total += deltas @ deltas.T
    return total.cpu()
