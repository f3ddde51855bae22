"""The pass that writes the result, block by block."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch

from fl_server_ai.aggregation.beside import Extras
from fl_server_ai.aggregation.blocks import FLOATS, Run, Source, Target
from fl_server_ai.aggregation.files import Files
from fl_server_ai.aggregation.fold import Folder, all_finite
from fl_server_ai.aggregation.integers import DTYPES, combine
from fl_server_ai.aggregation.masks import Masks
from fl_server_ai.aggregation.sparse import SparseBlock
from fl_server_ai.aggregation.state import State
from fl_server_ai.aggregation.statistics import is_statistic
from fl_server_ai.aggregation.strategy import Strategy
from fl_server_ai.containers import TensorInfo
from fl_server_core.exceptions import AggregationException

# Bytes that the crew holds of (updates x block) matrices; a rule needs a few times that.
ROWS_BUDGET = 16 << 20
Job = tuple[int, int, int]  # segment, first number of its run, how many
Span = tuple[int, int]  # of a run: the first number, and the one after the last


@dataclass(frozen=True)
class Segment:
    """A part of a run whose tensors were sent by the same updates, and are statistics or none of them is.

    It is `kept` as it is in the base if no update that counts has sent it, or nothing that counts.
    """

    run: int
    start: int
    count: int
    sources: tuple[Source, ...]
    weights: tuple[float, ...]
    kept: bool
    statistics: bool  # of a strategy that moves weights: they are not moved


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
        draft: Target,
        state: State,
        floats: Sequence[Run],
        sources: Sequence[Source],
        weights: Sequence[float],
        sent: Sequence[frozenset[str] | None],
        extras: Extras,
        masks: Masks,
        threads: int,
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
        self.extras = extras
        self.masks = masks
        self._budget = ROWS_BUDGET // max(2, threads)
        self.segments = [
            self._segment(index, start, count, senders, statistics, sources, weights)
            for index, run in enumerate(files.layout.runs)
            for start, count, senders, statistics in self._parts(run, sent)
        ]

    def _parts(
        self, run: Run, sent: Sequence[frozenset[str] | None]
    ) -> list[tuple[int, int, tuple[int, ...], bool]]:
        """First number, how many, whose updates count there, and whether it is statistics; in as few parts as may be."""
        everybody = tuple(range(len(sent)))
        whole = all(names is None for names in sent)
        apart = self.moves and run.dtype in FLOATS and self.strategy.takes != "mask"
        if whole and not apart:
            return [(0, run.count, everybody, False)]
        end = run.offset + run.count * run.itemsize
        inside = [t for t in self.files.layout.tensors if run.offset <= t.offset < end and t.nbytes]

        def kind(tensor: TensorInfo) -> tuple[tuple[int, ...], bool]:
            name, who = tensor.name, everybody
            if not whole:
                who = tuple(k for k in everybody if (of := sent[k]) is None or name in of)
            return who, apart and is_statistic(name)

        parts = []
        for (who, statistics), group in groupby(inside, key=kind):
            tensors = list(group)
            count = sum(tensor.nbytes for tensor in tensors) // run.itemsize
            first = (tensors[0].offset - run.offset) // run.itemsize
            parts.append((first, count, who, statistics))
        return parts

    def _segment(
        self,
        run: int,
        start: int,
        count: int,
        senders: Sequence[int],
        statistics: bool,
        sources: Sequence[Source],
        weights: Sequence[float],
    ) -> Segment:
        base = self.files.base
        kept = not senders or (statistics and self.strategy.takes == "gradient")
        if kept and base is not None:
            return Segment(run, start, count, (base,), (1.0,), kept=True, statistics=statistics)
        chosen = tuple(sources[k] for k in senders)
        shares = tuple(weights[k] for k in senders)
        return Segment(run, start, count, chosen, shares, kept=False, statistics=statistics)

    def jobs(self, spans: Sequence[Span]) -> list[Job]:
        """The blocks of these spans, one span for each run of the layout."""
        return [
            (index, at, min(length, end - at))
            for index, part in enumerate(self.segments)
            for length in [self._length(part)]
            for first, last in [spans[part.run]]
            for end in [min(part.start + part.count, last)]
            for at in range(max(part.start, first), end, length)
        ]

    def _length(self, part: Segment) -> int:
        """Numbers a block: less where a matrix of all updates must fit into the budget."""
        run = self.files.layout.runs[part.run]
        if run.dtype in FLOATS and not self.reduces:
            return self.block
        # Narrow floats are widened on the way, integers copied as int64.
        itemsize = max(4, run.itemsize) if run.dtype in FLOATS else 16
        return max(1, min(self.block, self._budget // (itemsize * len(part.sources))))

    def worker(self) -> Callable[[Job], None]:
        lengths = [
            self._length(part)
            for part in self.segments
            if self.files.layout.runs[part.run].dtype in FLOATS
        ]
        widest = max((run.itemsize for run in self.floats), default=1)
        if self.extras.names:
            widest = max(widest, 4)  # what lies beside a half is a float32
        folder = Folder(self.device, max(lengths, default=0), widest)

        def work(job: Job) -> None:
            index, start, count = job
            part = self.segments[index]
            run = self.files.layout.runs[part.run]
            with folder.on_device():
                if run.dtype in FLOATS:
                    data = self._floats(folder, part, run, start, count)
                else:
                    data = self._integers(part, run, start, count)
            self.draft.write(data, run.offset + start * run.itemsize)

        return work

    def _floats(
        self, folder: Folder, part: Segment, run: Run, start: int, count: int
    ) -> memoryview:
        base, index = self.files.base, self.floats.index(run)
        moves = self.moves and not part.statistics
        state: dict[str, torch.Tensor] = {}
        sent: torch.Tensor | None = None
        if base is not None and self.moves:
            state = self.state.read(index, start, count, self.device)
            if not part.statistics:
                state |= self.extras.read(folder, index, start, count)
        if self.reduces and not part.kept:
            y = self.strategy.reduce(folder.matrix(part.sources, run, start, count))
        elif base is not None and self.masks.among(part.sources):
            block = SparseBlock(
                self.masks, folder, part.sources, part.weights, base, run, index, start, count
            )
            y, sent = block.mean() if moves else block.rounded()
        elif moves:
            y = folder.mean(part.sources, part.weights, run, start, count)
        else:
            y = folder.rounded(part.sources, part.weights, run, start, count)
        if base is not None and self.moves and not part.kept:
            before = (
                {name: block.clone() for name, block in state.items()} if sent is not None else {}
            )
            x = folder.rows([base], run, start, count)[0].to(torch.float64)
            y = y.to(torch.float64)
            if part.statistics:
                y = self.strategy.statistics(x, y)
            else:
                y = self.strategy.update(x, y, state)
            if sent is not None:  # a number that nobody sent stays, and so does what is known of it
                y = torch.where(sent, y, x)
                state |= {name: torch.where(sent, state[name], before[name]) for name in before}
        if y.shape != (count,):
            raise AggregationException(f"the strategy made {tuple(y.shape)} of ({count},) numbers")
        values, data = folder.result(y, run)
        if not all_finite(values):
            raise AggregationException(self._culprit(folder, part, run, start, count))
        if base is not None and self.moves:
            self.state.write(index, start, state)
        return data

    def _culprit(self, folder: Folder, part: Segment, run: Run, start: int, count: int) -> str:
        blocks = folder.blocks(part.sources, run, start, count)
        for source, block in zip(part.sources, blocks, strict=True):
            bad = (~torch.isfinite(block.to(torch.float64))).nonzero()
            if len(bad):
                name = self.files.layout.locate(run.offset + (start + int(bad[0])) * run.itemsize)
                return f"the update of participant {source.participant} has NaN or infinity in {name!r}"
        return "the strategy's result has NaN or infinity in it, the updates have not"

    def _integers(self, part: Segment, run: Run, start: int, count: int) -> memoryview:
        rows = np.empty((len(part.sources), count), dtype=DTYPES[run.dtype])
        offset = run.offset + start * run.itemsize
        for row, source in zip(rows, part.sources, strict=True):
            source.read_into(row.view(np.uint8).data, offset)
        base = None
        if self.files.base is not None:
            base = np.empty(count, dtype=DTYPES[run.dtype])
            self.files.base.read_into(base.view(np.uint8).data, offset)
        result = combine(rows, part.weights, self.policy, base)
        return np.ascontiguousarray(result).view(np.uint8).data
