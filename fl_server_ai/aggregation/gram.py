"""Inner products of all updates, for rules that compare them (Krum, geometric median, clipping)."""

import functools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fl_server_ai.aggregation.blocks import Run, Source
from fl_server_ai.aggregation.crew import run_all
from fl_server_ai.aggregation.fold import Folder

Stripe = Sequence[tuple[Run, int, int]]  # blocks: their run, first number, how many
# (count,) float64 on the device, of a run from a number on
Beside = Callable[[Run, int, int], Tensor]
STRIPES = 8  # partial sums; fixed, so that the result does not depend on the number of threads
TILE = 24  # updates; the products above a tile on the diagonal are not worked out but mirrored
READ = 8 << 20  # bytes that a thread reads at a time, counted as float32
CACHED = 2 << 20  # bytes of float64 rows that are multiplied at a time


def chunk_length(updates: int) -> int:
    """Numbers multiplied at a time: like the stripes, it depends on nothing but the number of updates."""
    return max(256, min(16_384, CACHED // (8 * updates)))


def block_length(updates: int) -> int:
    """Numbers a block: whole chunks."""
    chunk = chunk_length(updates)
    return chunk * max(1, min(65_536, READ // (4 * updates)) // chunk)


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
    """The buffers of one thread: a block as it was read, and a chunk of it as float64 rows."""

    def __init__(self, device: torch.device, updates: int) -> None:
        length = block_length(updates)
        self.folder = Folder(device, length, 8)
        self._chunk = length if device.type == "cuda" else chunk_length(updates)
        with self.folder.on_device():
            self._rows = torch.empty(updates * self._chunk, dtype=torch.float64, device=device)

    def partial(
        self, base: Source, sources: Sequence[Source], last: Beside | None, stripe: Stripe
    ) -> Tensor:
        """(n, n) float64 on the CPU: products of (update - base) over one stripe; symmetric, bit for bit."""
        n = rows_of(sources, last)
        with self.folder.on_device():
            total = torch.zeros((n, n), dtype=torch.float64, device=self._rows.device)
            for run, start, count in stripe:
                x = self.folder.mean([base], [1], run, start, count)
                block = self.folder.matrix(sources, run, start, count)
                other = None if last is None else last(run, start, count)
                for first in range(0, count, self._chunk):
                    part = slice(first, min(first + self._chunk, count))
                    rows = self._rows[: n * (part.stop - first)].view(n, -1)
                    rows[: len(sources)].copy_(block[:, part]).sub_(x[part])
                    if other is not None:
                        rows[-1] = other[part]
                    for top in range(0, n, TILE):
                        beside = slice(top, top + TILE)
                        total[top:, beside] += rows[top:] @ rows[beside].T
            lower = total.tril_().cpu()
        return lower.add_(lower.tril(-1).T)


def rows_of(sources: Sequence[Source], last: Beside | None) -> int:
    """Of the Gram matrix."""
    return len(sources) + (last is not None)


def by_stripe(
    member: Callable[[], Callable[[Stripe], Tensor]],
    dealt: Sequence[Stripe],
    threads: int,
    chosen: Sequence[int],
) -> dict[int, Tensor]:
    """What the members of a crew, one a thread, make of the chosen stripes."""
    partial: dict[int, Tensor] = {}

    def worker() -> Callable[[int], None]:
        work = member()

        def add(index: int) -> None:
            partial[index] = work(dealt[index])

        return add

    run_all(list(chosen), threads, worker, None)
    return partial


def partial_products(
    base: Source,
    sources: Sequence[Source],
    device: torch.device,
    floats: Sequence[Run],
    threads: int,
    chosen: Sequence[int] = range(STRIPES),
    last: Beside | None = None,
) -> dict[int, Tensor]:
    """(n, n) float64 for each chosen stripe, in one pass over what belongs to those.

    With `last` it is (n + 1, n + 1): a vector more, which is taken as it is, comes at the end.
    """
    n = rows_of(sources, last)

    def member() -> Callable[[Stripe], Tensor]:
        return functools.partial(GramWorker(device, n).partial, base, sources, last)

    return by_stripe(member, stripes(floats, n), threads, chosen)


def total(partial: Mapping[int, Tensor]) -> Tensor:
    """The sum of all stripes, always taken in the same order, whoever worked them out."""
    made = partial[0].clone()
    for index in range(1, STRIPES):
        made += partial[index]
    return made


def inner_products(
    base: Source,
    sources: Sequence[Source],
    device: torch.device,
    floats: Sequence[Run],
    threads: int,
) -> Tensor:
    """(n, n) float64: products of (update - base) over all float numbers, in one pass over the files."""
    return total(partial_products(base, sources, device, floats, threads))
