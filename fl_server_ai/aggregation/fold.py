"""Weighted mean of a block of floats, in float64, through reused buffers.

Every product `n_k * x_k` is added in the order of the sources, their sum is divided once, and the caller casts
once. For dtypes of at most 32 bits and sample sizes below 2**29 the products are exact. float64 has no wider
type to add in, so there each product and sum carries its rounding error along in a second float64
(double-double: Dekker 1971), at less than a tenth of the speed.
Updates that are all alike give back their own bytes in each dtype, minus zero included.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor

from fl_server_ai.aggregation.blocks import FLOATS, Run, Source
from fl_server_ai.aggregation.rounding import narrowed
from fl_server_ai.aggregation.transfer import Lane, Slot, queue_of

EXACT_WEIGHT = 2**29  # times a 24-bit significand fits into the 53 bits of a float64
VELTKAMP = 2.0**27 + 1
SHRINK = 2.0**-64  # room for VELTKAMP, and for the sum of as many numbers as there can be updates


class Folder:
    """The buffers of one thread: 24 bytes for each number of a block, however many updates there are."""

    def __init__(self, device: torch.device, elements: int, itemsize: int) -> None:
        self.device = device
        self._queue = queue_of(device)
        nbytes = elements * itemsize
        self._slots: Sequence[Slot] = (
            [Slot(nbytes)] if self._queue is None else [Lane(nbytes, self._queue) for _ in range(2)]
        )
        self._turn = 0
        self._out = Slot(nbytes)
        self._sum = torch.empty(elements, dtype=torch.float64, device=device)
        self._wide = torch.empty(elements, dtype=torch.float64, device=device)
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
        """(count,) float64, valid until the next call."""
        if run.dtype == "F64":
            again = partial(self.blocks, sources, run, start, count)
            return mean_of_float64(again, weights)
        blocks = self.blocks(sources, run, start, count)
        total, wide = self._sum[:count], self._wide[:count]
        if len(sources) == 1:
            for block in blocks:
                wide.copy_(block)
            return wide
        exact = all(weight < EXACT_WEIGHT and weight == int(weight) for weight in weights)
        for index, (block, weight) in enumerate(zip(blocks, weights, strict=True)):
            wide.copy_(block)
            if index == 0:
                torch.mul(wide, weight, out=total)  # not 0 + x: that would turn -0 into 0
            elif exact:
                total.add_(wide, alpha=weight)
            else:
                # Two roundings. A fused multiply-add has one, and torch does not promise which of
                # the two it uses at the end of a block.
                total.add_(wide.mul_(weight))
        return total.div_(sum(weights))

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
                self._store = torch.empty(
                    size * run.itemsize, dtype=torch.uint8, device=self.device
                )
            flat = self._store[: size * run.itemsize]
            lines = [] if self._queue else [line.numpy().data for line in flat.view(key[1], -1)]
            self._matrices[key] = flat.view(FLOATS[run.dtype]).view(key[1], count), lines
        rows, lines = self._matrices[key]
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


def mean_of_float64(blocks: Callable[[], Iterator[Tensor]], weights: Sequence[float]) -> Tensor:
    """Weighted mean with about 106 bits in between, for all finite numbers.

    Where it overflows on its way, the blocks are read again and divided by a power of two: that loses
    nothing but bits more than a thousand below the largest, and other numbers keep what they have.
    """
    mean = _mean(blocks(), weights)
    if all_finite(mean):
        return mean
    exponent = math.frexp(max(weights))[1]
    shares = [math.ldexp(weight, -exponent) for weight in weights]
    shrunk = _mean((block * SHRINK for block in blocks()), shares) / SHRINK
    return torch.where(torch.isfinite(mean), mean, shrunk)


def _mean(blocks: Iterator[Tensor], weights: Sequence[float]) -> Tensor:
    high = low = torch.zeros(())
    for index, (block, weight) in enumerate(zip(blocks, weights, strict=True)):
        product, error = _product(block, float(weight))
        if index == 0:
            high, low = product, error
            continue
        total = high + product
        other = total - high
        low = low + (error + ((high - (total - other)) + (product - other)))
        high = total
    divisor = float(sum(weights))
    quotient = high / divisor
    product, error = _product(quotient, divisor)
    rest = (high - product) - error + low
    tail = math.fsum([*weights, -divisor])  # what the sum of fractional weights was rounded by
    if tail:
        rest = rest - quotient * tail
    rest = rest / divisor
    return torch.where(rest == 0, quotient, quotient + rest)  # -0 + 0 would be 0


def _product(values: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """`values * factor` and its rounding error."""
    product = values * factor
    scaled = values * VELTKAMP
    high = scaled - (scaled - values)
    low = values - high
    factor_high = VELTKAMP * factor - (VELTKAMP * factor - factor)
    factor_low = factor - factor_high
    error = high * factor_high - product
    error = error + high * factor_low
    error = error + low * factor_high
    return product, error + low * factor_low


def all_finite(values: Tensor) -> bool:
    """Whether a host block holds neither NaN nor infinity: neither can leave a sum finite."""
    wide = values if values.dtype in (torch.float64, torch.float32) else values.to(torch.float32)
    return math.isfinite(wide.sum().item()) or bool(torch.isfinite(wide).all())
