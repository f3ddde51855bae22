"""What a strategy remembers from round to round, as a safetensors file of flat vectors.

Vector `momentum.0` belongs to the model's first run of floats, and so on; the scalars of `state_dict` are JSON
in the header, and so is of how many participants the means are that are in it. float64 tensors have float64
state, all others float32.
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fl_server_ai.aggregation.blocks import (
    FLOATS,
    Layout,
    Run,
    Source,
    Target,
    layout_of,
    parse_layout,
)
from fl_server_ai.aggregation.fold import all_finite
from fl_server_ai.aggregation.shared import POPULATION, rescaling
from fl_server_ai.aggregation.strategy import Strategy
from fl_server_core.exceptions import AggregationException


class State:
    """The vectors before and after a round; there may be none before. Threads may share it.

    `tensor_at` names the model's tensor at a place in its file, for errors. `updates` are in the round.
    """

    def __init__(
        self,
        strategy: Strategy[Any],
        runs: Sequence[Run],
        state_in: Path | None,
        tensor_at: Callable[[int], str],
        updates: int,
    ) -> None:
        self._runs, self._tensor_at = runs, tensor_at
        self._names = strategy.state_blocks
        self._initial = strategy.initial_state()
        # Where nobody knows how many participants there are, means stay as they are.
        known = strategy.population_means and strategy.facts.population
        self._population = strategy.population(updates) if known else 0
        self._scales: dict[str, float] = {}
        self._vectors = {
            f"{name}.{index}": ("F64" if run.dtype == "F64" else "F32", run.count)
            for name in self._names
            for index, run in enumerate(runs)
        }
        self._old: Source | None = None
        self._old_places: dict[str, Run] = {}
        self._new: Target | None = None
        self._new_places: dict[str, Run] = {}
        if state_in is not None:
            self._load(state_in, strategy)

    def _load(self, path: Path, strategy: Strategy[Any]) -> None:
        self._old = Source(path, "(state)")
        layout = layout_of(self._old)
        self._old_places = _places(layout)
        found = {name: (place.dtype, place.count) for name, place in self._old_places.items()}
        if found != self._vectors:
            raise AggregationException(
                "the strategy's state belongs to another model or another strategy"
            )
        metadata = json.loads(layout.header[8:]).get("__metadata__", {})
        strategy.load_state_dict(json.loads(metadata.get("scalars", "{}")))
        scale = rescaling(metadata, self._population)
        self._scales = dict.fromkeys(strategy.population_means, scale)

    def header(self, strategy: Strategy[Any]) -> tuple[bytes, int] | None:
        """The new file's first bytes and its size, with the scalars that `strategy` has now; None if it has no state."""
        scalars = strategy.state_dict()
        if not (self._vectors or scalars):
            return None
        metadata = {"scalars": json.dumps(scalars, sort_keys=True)}
        if self._population:
            metadata[POPULATION] = str(self._population)
        header: dict[str, Any] = {"__metadata__": metadata}
        offset = 0
        for name, (dtype, count) in sorted(
            self._vectors.items(), key=lambda item: item[1][0] != "F64"
        ):
            end = offset + count * FLOATS[dtype].itemsize
            header[name] = {"dtype": dtype, "shape": [count], "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        raw = len(text).to_bytes(8, "little") + text
        self._new_places = _places(parse_layout(raw, len(raw) + offset))
        return raw, len(raw) + offset

    def places(self, index: int) -> list[Run]:
        """Where in the new file the vectors of the model's run `index` lie; after `header`."""
        return [self._new_places[f"{name}.{index}"] for name in self._names]

    def begin(self, target: Target) -> None:
        """Blocks of the new file go there; after `header`."""
        self._new = target

    def read(self, index: int, start: int, count: int, device: torch.device) -> dict[str, Tensor]:
        """A float64 block for every name, of the model's run `index`."""
        return {name: self._read(name, index, start, count).to(device) for name in self._names}

    def _read(self, name: str, index: int, start: int, count: int) -> Tensor:
        if self._old is None:
            return torch.full((count,), self._initial.get(name, 0.0), dtype=torch.float64)
        place = self._old_places[f"{name}.{index}"]
        block = torch.empty(count, dtype=FLOATS[place.dtype])
        view = block.numpy().data.cast("B")
        self._old.read_into(view, place.offset + start * place.itemsize)
        wide, scale = block.to(torch.float64), self._scales.get(name, 1.0)
        return wide if scale == 1.0 else wide * scale

    def write(self, index: int, start: int, state: dict[str, Tensor]) -> None:
        """Blocks of the model's run `index`, from number `start` on.

        `AggregationException` for what does not fit: an infinity would stay in the state for all rounds.
        """
        if self._new is None:
            return
        for name in self._names:
            place = self._new_places[f"{name}.{index}"]
            block = state[name].to("cpu", FLOATS[place.dtype]).contiguous()
            if not all_finite(block):
                run, bad = self._runs[index], int((~torch.isfinite(block)).nonzero()[0])
                raise AggregationException(
                    f"what the strategy remembers as {name!r} becomes NaN or infinity in tensor "
                    f"{self._tensor_at(run.offset + (start + bad) * run.itemsize)!r}: an update went too far"
                )
            view = block.numpy().data.cast("B")
            self._new.write(view, place.offset + start * place.itemsize)

    def assert_unchanged(self) -> None:
        if self._old is not None:
            self._old.assert_unchanged()

    def close(self) -> None:
        if self._old is not None:
            self._old.close()


def _places(layout: Layout) -> dict[str, Run]:
    return {
        tensor.name: Run(tensor.dtype, tensor.offset, math.prod(tensor.shape))
        for tensor in layout.tensors
    }
