"""The per-tensor extras of all updates, as blocks of their means."""

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from fl_server_ai.aggregation.blocks import (
    OPEN_FILES,
    Run,
    Source,
    UpdateChanged,
    UpdateFile,
    layout_of,
)
from fl_server_ai.aggregation.fold import Folder
from fl_server_core.exceptions import AggregationException


class Extras:
    """The open files beside the updates, which are all of one layout; nothing where none are wanted."""

    def __init__(
        self,
        stack: ExitStack,
        updates: Sequence[UpdateFile],
        names: Sequence[str],
        runs: Sequence[Run],
    ) -> None:
        self.names = tuple(names)
        self.sources: list[Source] = []
        self._places: dict[str, Run] = {}
        if not names:
            return
        wanted = {
            f"{name}.{index}": ("F64" if run.dtype == "F64" else "F32", run.count)
            for name in names
            for index, run in enumerate(runs)
        }
        for update in updates:
            if update.extras is None:
                raise AggregationException(
                    f"the update of participant {update.meta.participant} came without "
                    f"{', '.join(names)}"
                )
            keep_open = len(updates) <= OPEN_FILES // 2
            source = Source(update.extras, update.meta.participant, keep_open=keep_open)
            stack.callback(source.close)
            self._check(source, wanted)
            self.sources.append(source)
        layout = layout_of(self.sources[0])
        self._places = {
            tensor.name: Run(tensor.dtype, tensor.offset, wanted[tensor.name][1])
            for tensor in layout.tensors
        }

    @staticmethod
    def _check(source: Source, wanted: dict[str, tuple[str, int]]) -> None:
        found = {info.name: (info.dtype, info.shape) for info in layout_of(source).tensors}
        if found != {name: (dtype, (count,)) for name, (dtype, count) in wanted.items()}:
            raise UpdateChanged(source.participant, "has extras of another model or strategy")

    def read(self, folder: Folder, index: int, start: int, count: int) -> dict[str, Tensor]:
        """The mean of each name over all updates, (count,) float64, of the model's float run `index`."""
        ones = [1.0] * len(self.sources)
        return {
            name: folder.mean(self.sources, ones, self._places[f"{name}.{index}"], start, count)
            .to(torch.float64)
            .clone()
            for name in self.names
        }

    def assert_unchanged(self) -> None:
        for source in self.sources:
            source.assert_unchanged()
