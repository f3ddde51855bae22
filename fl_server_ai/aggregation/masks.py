"""Which single numbers updates left out: the masks beside them, read in blocks."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from fl_server_ai.aggregation.blocks import OPEN_FILES, Source, UpdateFile, layout_of


class Masks:
    """The open masks of a round, by participant; most updates have none. `index` counts the runs of floats."""

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

    def each(
        self, sources: Sequence[Source], index: int, start: int, count: int
    ) -> Iterator[Tensor | None]:
        """(count,) uint8 for each update, 1 where it sent a number; None if it is whole."""
        for source in sources:
            found = self._files.get(source.participant)
            if found is None:
                yield None
                continue
            file, offsets = found
            bits = torch.empty(count, dtype=torch.uint8)
            file.read_into(bits.numpy().data, offsets[f"mask.{index}"] + start)
            yield bits

    def anybody(self, sources: Sequence[Source], index: int, start: int, count: int) -> Tensor:
        """(count,) bool: whether there is an update that sent the number."""
        sent = torch.zeros(count, dtype=torch.uint8)
        for bits in self.each(sources, index, start, count):
            if bits is None:
                return torch.ones(count, dtype=torch.bool)
            sent |= bits
        return sent > 0

    def at(self, sources: Sequence[Source], index: int, start: int, where: Tensor) -> Tensor:
        """(updates, numbers) bool: who sent those numbers from `start` on, which are in rising order."""
        first, last = int(where[0]), int(where[-1])
        sent = torch.ones((len(sources), len(where)), dtype=torch.bool)
        for row, bits in zip(
            sent, self.each(sources, index, start + first, last - first + 1), strict=True
        ):
            if bits is not None:
                row.copy_(bits[where - first])
        return sent

    def assert_unchanged(self) -> None:
        for source, _ in self._files.values():
            source.assert_unchanged()
