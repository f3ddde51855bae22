"""Means in which each number has its own denominator: for updates that leave single numbers out."""

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from fl_server_ai.aggregation.blocks import OPEN_FILES, Run, Source, UpdateFile, layout_of
from fl_server_ai.aggregation.fold import Folder


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

        The base's numbers elsewhere. Plain float64 sums in the order of the updates, for float64 too; where
        all that was sent is alike, that number, bit for bit.
        """
        nothing = torch.full((count,), -0.0, dtype=torch.float64, device=folder.device)
        total, first = nothing.clone(), nothing.clone()  # -0 + x is x, -0 included
        divisor = torch.zeros(count, dtype=torch.float64, device=folder.device)
        alike = torch.ones(count, dtype=torch.bool, device=folder.device)
        blocks = folder.blocks(sources, run, start, count)
        for source, weight, block in zip(sources, weights, blocks, strict=True):
            share = self._mask(source, index, start, count, folder.device) * weight
            values, here = block.to(torch.float64), share > 0
            first = torch.where(here & (divisor == 0), values, first)
            alike &= ~here | (values == first)
            total += torch.where(here, values * share, nothing)
            divisor += share
        x = folder.rows([base], run, start, count)[0].to(torch.float64)
        sent = divisor > 0
        mean = total / torch.where(sent, divisor, 1.0)
        mean = torch.where(alike & (first != 0), first, mean)
        return torch.where(sent, mean, x), sent

    def _mask(
        self, source: Source, index: int, start: int, count: int, device: torch.device
    ) -> Tensor:
        found = self._files.get(source.participant)
        if found is None:
            return torch.ones(count, dtype=torch.float64, device=device)
        file, offsets = found
        bits = torch.empty(count, dtype=torch.uint8)
        file.read_into(bits.numpy().data, offsets[f"mask.{index}"] + start)
        return bits.to(device, torch.float64)

    def assert_unchanged(self) -> None:
        for source, _ in self._files.values():
            source.assert_unchanged()
