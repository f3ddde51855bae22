"""Weighted mean of a block of floats, in float64, through reused buffers.

Every product `n_k * x_k` is added in the order of the sources, their sum is divided once, and the caller casts
once. For dtypes of at most 32 bits and sample sizes below 2**29 the products are exact. float64 has no wider
type to add in: `double.py`. What these sums could be off by is known, and numbers that this leaves in doubt are
settled by exact arithmetic (`exact.py`), so that a mean is correctly rounded, also where its terms cancel.
Updates that are all alike give back their own bytes in each dtype, minus zero included.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import numpy as np
import torch
from torch import Tensor

from fl_server_ai.aggregation.blocks import FLOATS, Run, Source
from fl_server_ai.aggregation.compiled import descriptors, kernels
from fl_server_ai.aggregation.double import mean_of_float64
from fl_server_ai.aggregation.exact import (
    Doubt,
    exact_products,
    in_small_numbers,
    least_squares,
    settled,
    unit_of,
)
from fl_server_ai.aggregation.pages import room
from fl_server_ai.aggregation.rounding import narrowed
from fl_server_ai.aggregation.transfer import Lane, Slot, queue_of

MANY = 8192  # of a block: perhaps only because they are zero
ROOM = 8 << 20  # bytes of a thread for numbers in doubt
FEW = 48  # numbers of an update that are sooner read one by one than with their block


class Folder:
    """The buffers of one thread: 44 bytes for each number of a block, however many updates there are."""

    def __init__(self, device: torch.device, elements: int, itemsize: int) -> None:
        self.device = device
        self._queue = queue_of(device)
        self._kernels = kernels() if self._queue is None else None
        nbytes = elements * itemsize
        self._slots: Sequence[Slot] = (
            [Slot(nbytes)] if self._queue is None else [Lane(nbytes, self._queue) for _ in range(2)]
        )
        self._turn = 0
        self._out = Slot(nbytes)
        with self.on_device():  # memory belongs to the stream on which it was made
            self._sum = torch.empty(elements, dtype=torch.float64, device=device)
            self._wide = torch.empty(elements, dtype=torch.float64, device=device)
        self._doubt: Doubt | None = None
        self._where: Tensor | None = None
        self._store: Tensor | None = None
        self._matrices: dict[tuple[str, int, int], tuple[Tensor, list[memoryview]]] = {}

    def on_device(self) -> AbstractContextManager[object]:
        """Make this thread's stream the current one; nothing on a CPU."""
        return nullcontext() if self._queue is None else self._queue.calculating()

    def blocks(
        self, sources: Sequence[Source], run: Run, start: int, count: int
    ) -> Iterator[Tensor]:
        """Each source's block in its own dtype; a block is valid until the next is asked for."""
        for source in sources:
            slot = self._slots[self._turn]
            self._turn = (self._turn + 1) % len(self._slots)
            try:
                yield slot.load(source, run, start, count)
            finally:
                slot.used()

    def mean(
        self, sources: Sequence[Source], weights: Sequence[float], run: Run, start: int, count: int
    ) -> Tensor:
        """(count,) float64, valid until the next call; not always the float64 that is nearest."""
        if run.dtype == "F64":
            return mean_of_float64(partial(self.blocks, sources, run, start, count), weights)[0]
        added = self._added(sources, weights, run, start, count)
        return added[0] if added else self._mean(sources, weights, run, start, count)

    def rounded(
        self, sources: Sequence[Source], weights: Sequence[float], run: Run, start: int, count: int
    ) -> Tensor:
        """(count,) float64 that the run's dtype rounds to what is nearest to the exact mean; valid until the next call."""
        if len(sources) == 1:
            return self._mean(sources, weights, run, start, count)
        weights = in_small_numbers(weights)
        if run.dtype == "F64":
            again = partial(self.blocks, sources, run, start, count)
            mean, doubtful = mean_of_float64(again, weights)
        elif added := self._added(sources, weights, run, start, count, unit_of(weights)):
            mean, doubtful = added
        else:
            dtype = FLOATS[run.dtype]
            kept = dtype if dtype == torch.float32 else torch.float64
            if self._doubt is None:
                self._doubt = Doubt(self.device, self._sum.numel())
            squares = self._doubt.squares(count, len(sources), kept)
            mean = self._mean(sources, weights, run, start, count, squares)
            doubtful = self._doubt.left_by(squares, mean, weights, dtype)
        if doubtful.numel() > MANY:
            doubtful = doubtful[self._anything(sources, run, start, count)[doubtful]]
        self.settle(mean, doubtful, sources, weights, run, start)
        return mean

    def settle(
        self,
        mean: Tensor,
        doubtful: Tensor,
        sources: Sequence[Source],
        weights: Sequence[float],
        run: Run,
        start: int,
        sent: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Put exact means where `mean` is `doubtful`, indices in rising order, a portion at a time.

        `sent` says which updates count at some of them: (updates, numbers) bool, on the host.
        """
        most = max(1, ROOM // (16 * len(sources)))
        for first in range(0, doubtful.numel(), most):
            some = doubtful[first : first + most]
            columns = self._columns(sources, run, start, some)
            here = None if sent is None else sent(some)
            if here is not None:
                columns.masked_fill_(~here, 0.0)
            found = settled(columns, weights, FLOATS[run.dtype], here).to(self.device)
            zero = (found == 0) & (mean[some] == 0)  # of whatever sign it has
            mean[some] = torch.where(zero, mean[some], found)

    def _anything(self, sources: Sequence[Source], run: Run, start: int, count: int) -> Tensor:
        """(count,) bool: where any update has another number than zero."""
        found = torch.zeros(count, dtype=torch.bool, device=self.device)
        for block in self.blocks(sources, run, start, count):
            found |= (block if block.element_size() > 1 else block.float()) != 0
        return found

    def _columns(self, sources: Sequence[Source], run: Run, start: int, where: Tensor) -> Tensor:
        """(updates, numbers) float64 on the host, of a block's numbers at `where`, in rising order."""
        columns = torch.empty((len(sources), where.numel()), dtype=torch.float64)
        if where.numel() > FEW or not all(source.fd is not None for source in sources):
            first, last = int(where[0]), int(where[-1])
            blocks = self.blocks(sources, run, start + first, last - first + 1)
            for row, block in zip(columns, blocks, strict=True):
                row.copy_((block if block.element_size() > 1 else block.float())[where - first])
            return columns
        places = [run.offset + (start + at) * run.itemsize for at in where.tolist()]
        for row, source in zip(columns, sources, strict=True):
            found = bytearray(source.read_each(places, run.itemsize))
            row.copy_(torch.frombuffer(found, dtype=FLOATS[run.dtype]))
        return columns

    def _mean(
        self,
        sources: Sequence[Source],
        weights: Sequence[float],
        run: Run,
        start: int,
        count: int,
        squares: Tensor | None = None,
    ) -> Tensor:
        """Of up to 32 bits, or of one source. What they squared sum up to is added to `squares`."""
        blocks = self.blocks(sources, run, start, count)
        total, wide = self._sum[:count], self._wide[:count]
        if len(sources) == 1:
            for block in blocks:
                wide.copy_(block)
            return wide
        exact = exact_products(weights)
        for index, (block, weight) in enumerate(zip(blocks, weights, strict=True)):
            wide.copy_(block)
            if squares is not None:
                values = block if block.dtype == squares.dtype else wide
                squares.addcmul_(values, values)
            if index == 0:
                torch.mul(wide, weight, out=total)  # not 0 + x: that would turn -0 into 0
            elif exact:
                total.add_(wide, alpha=weight)
            else:
                # Two roundings. A fused multiply-add has one, and torch does not promise which of
                # the two it uses at the end of a block.
                total.add_(wide.mul_(weight))
        return total.div_(math.fsum(weights))

    def _added(
        self,
        sources: Sequence[Source],
        weights: Sequence[float],
        run: Run,
        start: int,
        count: int,
        unit: float = 0.0,
    ) -> tuple[Tensor, Tensor] | None:
        """What `_mean` makes, and with a `unit` what is in doubt, by one compiled loop; None where there is none."""
        if self._kernels is None or run.dtype != "F32" or len(sources) == 1:
            return None
        files = descriptors(sources)
        if files is None:
            return None
        if self._where is None:
            self._where = torch.empty(self._sum.numel(), dtype=torch.int64)
        mean, where = self._sum[:count], self._where
        found = self._kernels.add_up(
            files,
            run.offset + start * run.itemsize,
            np.array(weights, dtype=np.float64),
            math.fsum(weights),
            unit,
            least_squares(len(sources)),
            mean.numpy(),
            where.numpy(),
        )
        return None if found < 0 else (mean, where[:found])  # torch's way says whose file it is

    def rows(self, sources: Sequence[Source], run: Run, start: int, count: int) -> Tensor:
        """(updates, count) in the run's dtype."""
        rows = torch.empty((len(sources), count), dtype=FLOATS[run.dtype], device=self.device)
        for row, block in zip(rows, self.blocks(sources, run, start, count), strict=True):
            row.copy_(block)
        return rows

    def matrix(self, sources: Sequence[Source], run: Run, start: int, count: int) -> Tensor:
        """The same as `rows` in a buffer that is kept: valid until the next call."""
        key = run.dtype, len(sources), count
        if key not in self._matrices:
            size = key[1] * count
            if self._store is None or self._store.numel() < size * run.itemsize:
                self._matrices.clear()
                self._store = None  # not two at a time
                self._store = room(size * run.itemsize, self.device)
            flat = self._store[: size * run.itemsize]
            lines = [] if self._queue else [line.numpy().data for line in flat.view(key[1], -1)]
            self._matrices[key] = flat.view(FLOATS[run.dtype]).view(key[1], count), lines
        rows, lines = self._matrices[key]
        files = descriptors(sources) if self._kernels else None
        if self._kernels and files is not None:
            raw = rows.view(torch.uint8).numpy()
            if self._kernels.read_rows(files, run.offset + start * run.itemsize, raw) == len(raw):
                return rows
        for line, source in zip(lines, sources, strict=False):  # straight to its place
            source.read_into(line, run.offset + start * run.itemsize)
        if not lines:
            for row, block in zip(rows, self.blocks(sources, run, start, count), strict=True):
                row.copy_(block)
        return rows

    def result(self, values: Tensor, run: Run) -> tuple[Tensor, memoryview]:
        """`values` cast to the run's dtype, as a host tensor and its bytes; valid until the next call."""
        host, data = self._out.view(run, values.numel())
        values = narrowed(values, host.dtype)
        host.copy_(values.to(host.dtype) if self._queue else values)
        return host, data


def all_finite(values: Tensor) -> bool:
    """Whether a host block holds neither NaN nor infinity: neither can leave a sum finite."""
    wide = values if values.dtype in (torch.float64, torch.float32) else values.to(torch.float32)
    return math.isfinite(wide.sum().item()) or bool(torch.isfinite(wide).all())
