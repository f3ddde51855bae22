"""Updates that were trained from an older model, read as if they had started from the current one."""

from bisect import bisect_right
from collections.abc import Iterator

import torch

from fl_server_ai.aggregation.blocks import FLOATS, Layout, Source
from fl_server_ai.aggregation.rounding import narrowed
from fl_server_ai.aggregation.statistics import is_statistic


class RebasedSource(Source):
    """What `own` has learned since `start`, on top of `base`: own + (base - start), number by number.

    Worked out in float64 as blocks are read and rounded once to the tensor's dtype, so that no file is
    written and no strategy sees a difference. Integers and running statistics are `own`'s: a variance that is moved may fall
    below 0. The three files are the caller's.
    """

    def __init__(self, own: Source, start: Source, base: Source) -> None:
        self.own, self.start, self.base = own, start, base
        self.path = own.path
        self.participant = own.participant
        self.size = own.size
        self.header = own.header
        self._fd = None
        self._offsets: list[int] = []
        self._dtypes: list[str] = []
        self._statistics: list[tuple[int, int]] = []

    def learn(self, layout: Layout) -> None:
        """Where which dtype begins, and statistics lie; told once, before the first block is read."""
        self._offsets = [run.offset for run in layout.runs]
        self._dtypes = [run.dtype for run in layout.runs]
        self._statistics = [
            (tensor.offset, tensor.offset + tensor.nbytes)
            for tensor in layout.tensors
            if is_statistic(tensor.name)
        ]

    def read_into(self, target: memoryview, offset: int) -> None:
        """Bytes of one run, as the engine reads them."""
        self.own.read_into(target, offset)
        dtype = self._dtypes[bisect_right(self._offsets, offset) - 1]
        if dtype not in FLOATS:
            return
        kept = list(self._kept(target, offset))
        numbers = torch.frombuffer(target, dtype=FLOATS[dtype])
        moved = self._other(self.base, offset, len(target), dtype)
        moved -= self._other(self.start, offset, len(target), dtype)
        numbers.copy_(narrowed(moved.add_(numbers), numbers.dtype))
        for at, own in kept:
            target[at : at + len(own)] = own

    def _kept(self, target: memoryview, offset: int) -> Iterator[tuple[int, bytes]]:
        """Copies of the statistics among these bytes, and where they lie."""
        end = offset + len(target)
        for first, last in self._statistics:
            if first < end and offset < last:
                at = max(first, offset) - offset
                yield at, bytes(target[at : min(last, end) - offset])

    @staticmethod
    def _other(source: Source, offset: int, nbytes: int, dtype: str) -> torch.Tensor:
        data = bytearray(nbytes)
        source.read_into(memoryview(data), offset)
        return torch.frombuffer(data, dtype=FLOATS[dtype]).to(torch.float64)

    def digest(self) -> str:
        """sha256 of the update as it was accepted."""
        return self.own.digest()

    def assert_unchanged(self) -> None:
        self.own.assert_unchanged()
        self.start.assert_unchanged()

    def close(self) -> None:
        """Nothing: its files are closed by who opened them."""
