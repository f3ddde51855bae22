"""The pass that writes the result, block by block."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from fl_server_ai.aggregation.blocks import FLOATS, Draft, Run, Source
from fl_server_ai.aggregation.files import Files
from fl_server_ai.aggregation.fold import Folder, all_finite
from fl_server_ai.aggregation.integers import DTYPES, combine
from fl_server_ai.aggregation.state import State
from fl_server_ai.aggregation.strategy import Strategy
from fl_server_core.exceptions import AggregationException

ROWS_BUDGET = 16 << 20  # bytes a thread holds of an (updates x block) matrix
Job = tuple[int, int, int]  # run, first number, how many


def overrides(strategy: Strategy[Any], method: str) -> bool:
    """Whether the strategy brings its own `method`."""
    return getattr(type(strategy), method) is not getattr(Strategy, method)


class Step:
    """The pass that writes the result; its jobs touch disjoint bytes, so they need no order."""

    def __init__(
        self,
        files: Files,
        strategy: Strategy[Any],
        policy: str,
        device: torch.device,
        block: int,
        draft: Draft,
        state: State,
        floats: Sequence[Run],
        sources: Sequence[Source],
        weights: Sequence[float],
    ) -> None:
        self.files = files
        self.strategy = strategy
        self.policy = policy
        self.reduces = overrides(strategy, "reduce")
        self.moves = overrides(strategy, "update")
        self.device = device
        self.block = block
        self.draft = draft
        self.state = state
        self.floats = floats
        self.sources = sources
        self.weights = weights

    def jobs(self) -> list[Job]:
        return [
            (index, start, min(length, run.count - start))
            for index, run in enumerate(self.files.layout.runs)
            for length in [self._length(run)]
            for start in range(0, run.count, length)
        ]

    def _length(self, run: Run) -> int:
        """Numbers a block: less where a matrix of all updates must fit into the budget."""
        if run.dtype in FLOATS and not self.reduces:
            return self.block
        itemsize = run.itemsize if run.dtype in FLOATS else 16  # int64 copies of integers
        return max(1, min(self.block, ROWS_BUDGET // (itemsize * len(self.sources))))

    def worker(self) -> Callable[[Job], None]:
        longest = max((self._length(run) for run in self.floats), default=0)
        widest = max((run.itemsize for run in self.floats), default=1)
        folder = Folder(self.device, longest, widest)

        def work(job: Job) -> None:
            index, start, count = job
            run = self.files.layout.runs[index]
            with folder.on_device():
                if run.dtype in FLOATS:
                    data = self._floats(folder, run, start, count)
                else:
                    data = self._integers(run, start, count)
            self.draft.write(data, run.offset + start * run.itemsize)

        return work

    def _floats(self, folder: Folder, run: Run, start: int, count: int) -> memoryview:
        if self.reduces:
            y = self.strategy.reduce(folder.matrix(self.sources, run, start, count))
        else:
            y = folder.mean(self.sources, self.weights, run, start, count)
        if self.moves and self.files.base is not None:
            index = self.floats.index(run)
            state = self.state.read(index, start, count, self.device)
            x = folder.rows([self.files.base], run, start, count)[0].to(torch.float64)
            y = self.strategy.update(x, y.to(torch.float64), state)
            self.state.write(index, start, state)
        if y.shape != (count,):
            raise AggregationException(f"the strategy made {tuple(y.shape)} of ({count},) numbers")
        values, data = folder.result(y, run)
        if not all_finite(values):
            raise AggregationException(self._culprit(folder, run, start, count))
        return data

    def _culprit(self, folder: Folder, run: Run, start: int, count: int) -> str:
        blocks = folder.blocks(self.sources, run, start, count)
        for source, block in zip(self.sources, blocks, strict=True):
            bad = (~torch.isfinite(block.to(torch.float64))).nonzero()
            if len(bad):
                name = self.files.layout.locate(run.offset + (start + int(bad[0])) * run.itemsize)
                return f"the update of participant {source.participant} has NaN or infinity in {name!r}"
        return "the strategy's result has NaN or infinity in it, the updates have not"

    def _integers(self, run: Run, start: int, count: int) -> memoryview:
        rows = np.empty((len(self.sources), count), dtype=DTYPES[run.dtype])
        offset = run.offset + start * run.itemsize
        for row, source in zip(rows, self.sources, strict=True):
            source.read_into(row.view(np.uint8).data, offset)
        base = None
        if self.files.base is not None:
            base = np.empty(count, dtype=DTYPES[run.dtype])
            self.files.base.read_into(base.view(np.uint8).data, offset)
        result = combine(rows, self.weights, self.policy, base)
        return np.ascontiguousarray(result).view(np.uint8).data
