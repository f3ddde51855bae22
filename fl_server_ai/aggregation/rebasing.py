"""Updates that were trained from an older model, read as if they had started from the current one."""

from bisect import bisect_right

import torch

from fl_server_ai.aggregation.blocks import FLOATS, Layout, Source
from fl_server_ai.aggregation.rounding import narrowed


class RebasedSource(Source):
    """What `own` has learned since `start`, on top of `base`: own + (base - start), number by number.

    Worked out in float64 as blocks are read and rounded once to the tensor's dtype, so that no file is
    written and no strategy sees a difference. Integers are `own`'s. The three files are the caller's.
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

    def learn(self, layout: Layout) -> None:
        """Where which dtype begins; told once, before the first block is read."""
        self._offsets = [run.offset for run in layout.runs]
        self._dtypes = [run.dtype for run in layout.runs]

    def read_into(self, target: memoryview, offset: int) -> None:
        """Bytes of one run, as the engine reads them."""
        self.own.read_into(target, offset)
        dtype = self._dtypes[bisect_right(self._offsets, offset) - 1]
        if dtype not in FLOATS:
            return
        numbers = torch.frombuffer(target, dtype=FLOATS[dtype])
        moved = self._other(self.base, offset, len(target), dtype)
        moved -= self._other(self.start, offset, len(target), dtype)
        numbers.copy_(narrowed(moved.add_(numbers), numbers.dtype))

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
