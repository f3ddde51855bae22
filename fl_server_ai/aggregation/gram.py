"""Inner products of all updates, for rules that compare them (Krum, geometric median, clipping)."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fl_server_ai.aggregation.blocks import Run, Source
from fl_server_ai.aggregation.crew import run_all
from fl_server_ai.aggregation.fold import Folder

STRIPES = 8  # partial sums; fixed, so that the result does not depend on the number of threads
TILE = 32  # updates; the products below a tile on the diagonal are not worked out but mirrored
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


class GramWorker:
    """The buffers of one thread: the float64 rows of a block, and one block read from a file."""

    def __init__(self, device: torch.device, updates: int) -> None:
        length = block_length(updates)
        self.folder = Folder(device, length, 8)
        self._rows = torch.empty((updates, length), dtype=torch.float64, device=device)

    def partial(
        self, base: Source, sources: Sequence[Source], stripe: Sequence[tuple[Run, int, int]]
    ) -> Tensor:
        """(n, n) float64 on the CPU: products of (update - base) over one stripe; symmetric, bit for bit."""
        n = len(sources)
        total = torch.zeros((n, n), dtype=torch.float64, device=self._rows.device)
        with self.folder.on_device():
            for run, start, count in stripe:
                rows = self._rows[:, :count]
                x = self.folder.mean([base], [1], run, start, count)
                blocks = self.folder.blocks(sources, run, start, count)
                for row, block in zip(rows, blocks, strict=True):
                    row.copy_(block).sub_(x)
                for top in range(0, n, TILE):
                    above = slice(top, top + TILE)
                    total[above, top:] += rows[above] @ rows[top:].T
        upper = total.triu().cpu()
        return upper + upper.triu(1).T


def partial_products(
    base: Source,
    sources: Sequence[Source],
    device: torch.device,
    floats: Sequence[Run],
    threads: int,
    chosen: Sequence[int] = range(STRIPES),
) -> dict[int, Tensor]:
    """(n, n) float64 for each chosen stripe, in one pass over what belongs to those."""
    n = len(sources)
    dealt = stripes(floats, n)
    partial: dict[int, Tensor] = {}

    def worker() -> Callable[[int], None]:
        crew_member = GramWorker(device, n)

        def add(index: int) -> None:
            partial[index] = crew_member.partial(base, sources, dealt[index])

        return add

    run_all(list(chosen), threads, worker, None)
    return partial


def total(partial: Mapping[int, Tensor]) -> Tensor:
    """The sum of all stripes, always taken in the same order, whoever worked them out."""
    return torch.stack([partial[index] for index in range(STRIPES)]).sum(dim=0)


def inner_products(
    base: Source,
    sources: Sequence[Source],
    device: torch.device,
    floats: Sequence[Run],
    threads: int,
) -> Tensor:
    """(n, n) float64: products of (update - base) over all float numbers, in one pass over the files."""
    return total(partial_products(base, sources, device, floats, threads))
