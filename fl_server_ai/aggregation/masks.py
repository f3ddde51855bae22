"""Means in which each number has its own denominator: for updates that leave single numbers out."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor

from fl_server_ai.aggregation.blocks import (
    FLOATS,
    OPEN_FILES,
    Run,
    Source,
    UpdateFile,
    layout_of,
)
from fl_server_ai.aggregation.double import Divisor, mean_of_float64, sum_over
from fl_server_ai.aggregation.exact import undecided, unit_where_sent
from fl_server_ai.aggregation.fold import Folder

LEAST = 2.0**-1000  # far more than what vanishes from products that underflow


class Masks:
    """The open masks of a round, by participant; most updates have none."""

    def __init__(self, stack: ExitStack, updates: Sequence[UpdateFile]) -> None:
        self._files: dict[str, tuple[Source, dict[str, int]]] = {}
        for update in updates:
            if update.mask is not None:
                participant = update.meta.participant
                keep_open = len(updates) <= OPEN_FILES // 2
                source = Source(update.mask, participant, keep_open=keep_open)
                stack.callback(source.close)
                offsets = {info.name: info.offset for info in layout_of(source).tensors}
                self._files[participant] = source, offsets

    def among(self, sources: Sequence[Source]) -> bool:
        return any(source.participant in self._files for source in sources)

    def mean(
        self,
        folder: Folder,
        sources: Sequence[Source],
        weights: Sequence[float],
        base: Source,
        run: Run,
        index: int,
        start: int,
        count: int,
    ) -> tuple[Tensor, Tensor]:
        """sum w m x / sum w m over the updates, (count,) float64, and where anybody sent a number.

        The base's numbers elsewhere. Plain float64 sums in the order of the updates, for float64 too, as
        for strategies that do more with a mean; where all that was sent is alike, that number, bit for bit.
        """
        nothing = torch.full((count,), -0.0, dtype=torch.float64, device=folder.device)
        total, first = nothing.clone(), nothing.clone()  # -0 + x is x, -0 included
        divisor = torch.zeros(count, dtype=torch.float64, device=folder.device)
        alike = torch.ones(count, dtype=torch.bool, device=folder.device)
        blocks = folder.blocks(sources, run, start, count)
        masks = self._masks(sources, index, start, count, folder.device)
        for block, weight, mask in zip(blocks, weights, masks, strict=True):
            values, here = block.to(torch.float64), mask > 0
            first = torch.where(here & (divisor == 0), values, first)
            alike &= ~here | (values == first)
            share = mask * weight
            total += torch.where(here, values * share, nothing)
            divisor += share
        sent = divisor > 0
        mean = total / torch.where(sent, divisor, 1.0)
        mean = torch.where(alike & (first != 0), first, mean)
        return self._kept(folder, mean, sent, base, run, start)

    def rounded(
        self,
        folder: Folder,
        sources: Sequence[Source],
        weights: Sequence[float],
        base: Source,
        run: Run,
        index: int,
        start: int,
        count: int,
    ) -> tuple[Tensor, Tensor]:
        """The same, but float64 that the run's dtype rounds to what is nearest to the exact mean."""
        masks = partial(self._masks, sources, index, start, count, folder.device)
        blocks = partial(self._zeroed, folder, sources, run, index, start, count)
        sent = self._anybody(sources, index, start, count).to(folder.device)
        if run.dtype == "F64":
            mean, doubtful = mean_of_float64(blocks, weights, partial(_sum_over, masks))
        else:
            mean = torch.full((count,), -0.0, dtype=torch.float64, device=folder.device)
            sizes, divisor = torch.full_like(mean, LEAST), torch.zeros_like(mean)
            for block, weight, mask in zip(blocks(), weights, masks(), strict=True):
                term = block.to(torch.float64).mul_(weight)
                mean.add_(term)
                sizes.add_(term.abs_())
                divisor.add_(mask, alpha=weight)
            divisor.masked_fill_(~sent, 1.0)
            mean.div_(divisor)
            off = sizes.div_(divisor).mul_(unit_where_sent(len(sources)))
            doubtful = undecided(mean, off, FLOATS[run.dtype])
        here = partial(self._sent, sources, index, start)
        folder.settle(mean, doubtful, sources, weights, run, start, here)
        return self._kept(folder, mean, sent, base, run, start)

    def _kept(
        self, folder: Folder, mean: Tensor, sent: Tensor, base: Source, run: Run, start: int
    ) -> tuple[Tensor, Tensor]:
        x = folder.rows([base], run, start, mean.numel())[0].to(torch.float64)
        return torch.where(sent, mean, x), sent

    def _zeroed(
        self,
        folder: Folder,
        sources: Sequence[Source],
        run: Run,
        index: int,
        start: int,
        count: int,
    ) -> Iterator[Tensor]:
        """Each update's block, with -0 where it sent nothing: x + -0 is x, -0 included."""
        blocks = folder.blocks(sources, run, start, count)
        masks = self._masks(sources, index, start, count, folder.device)
        for block, mask in zip(blocks, masks, strict=True):
            yield torch.where(mask > 0, block.to(torch.float64), -0.0) if mask.dim() else block

    def _masks(
        self, sources: Sequence[Source], index: int, start: int, count: int, device: torch.device
    ) -> Iterator[Tensor]:
        """(count,) float64 for each update, 1 where it sent a number; a single 1 if all."""
        for source in sources:
            bits = self._bits(source, index, start, count)
            yield (
                torch.ones((), dtype=torch.float64)
                if bits is None
                else bits.to(device, torch.float64)
            )

    def _sent(self, sources: Sequence[Source], index: int, start: int, where: Tensor) -> Tensor:
        """(updates, numbers) bool, on the host: who sent those numbers of a block, in rising order."""
        at = where.cpu()
        first, last = int(at[0]), int(at[-1])
        sent = torch.ones((len(sources), len(at)), dtype=torch.bool)
        for row, source in zip(sent, sources, strict=True):
            bits = self._bits(source, index, start + first, last - first + 1)
            if bits is not None:
                row.copy_(bits[at - first])
        return sent

    def _anybody(self, sources: Sequence[Source], index: int, start: int, count: int) -> Tensor:
        """(count,) bool, on the host: whether there is an update that sent the number."""
        sent = torch.zeros(count, dtype=torch.uint8)
        for source in sources:
            bits = self._bits(source, index, start, count)
            if bits is None:
                return torch.ones(count, dtype=torch.bool)
            sent |= bits
        return sent > 0

    def _bits(self, source: Source, index: int, start: int, count: int) -> Tensor | None:
        """(count,) uint8, on the host; None if the update is whole."""
        found = self._files.get(source.participant)
        if found is None:
            return None
        file, offsets = found
        bits = torch.empty(count, dtype=torch.uint8)
        file.read_into(bits.numpy().data, offsets[f"mask.{index}"] + start)
        return bits

    def assert_unchanged(self) -> None:
        for source, _ in self._files.values():
            source.assert_unchanged()


def _sum_over(masks: Callable[[], Iterator[Tensor]], weights: Sequence[float]) -> Divisor:
    return sum_over(masks(), weights)
