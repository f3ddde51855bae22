"""Aggregate weight files into one, in blocks: memory does not grow with the number of updates."""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from fl_server_ai.aggregation.blocks import Draft, UpdateChanged, UpdateFile
from fl_server_ai.aggregation.combination import BLOCK, Combination, Inputs
from fl_server_ai.aggregation.crew import Progress
from fl_server_ai.aggregation.device import resolve, single_threaded_torch, thread_count
from fl_server_ai.aggregation.strategy import Strategy

__all__ = ["Aggregated", "Inputs", "UpdateChanged", "UpdateFile", "aggregate"]
MadeT = TypeVar("MadeT")


@dataclass(frozen=True)
class Aggregated:
    """What was written: `digest` is the sha256 (hex) of the file, `size` its bytes."""

    digest: str
    size: int
    num_updates: int
    total_weight: float
    warnings: list[str]
    scalars: dict[str, Any] = field(default_factory=dict)  # the strategy's `state_dict` afterwards


def aggregate(
    *,
    base: Path | None,
    updates: Sequence[UpdateFile],
    out: Path,
    strategy: Strategy[Any],
    state_in: Path | None = None,
    state_out: Path | None = None,
    device: str = "auto",
    buffer_policy: str = "mean",
    threads: int | None = None,
    progress: Progress | None = None,
    verify: bool = False,
    block: int = BLOCK,
) -> Aggregated:
    """Write the strategy's combination of `updates` to `out`; the same bytes for any order, block or threads.

    An update with a `start` is combined as if it had been trained from `base` (`rebasing.py`), and counts with its
    `discount`. All files are canonical safetensors files with the same header; they are read, never written. `out` appears
    complete and durable or not at all, and is replaced if it exists; `state_out` appears just before it, and
    only if the strategy has a state. Calling again with the same input makes the same files.

    What the files' system knows of them (size, change time) is compared before and after; `verify` also compares every file
    with its `sha256` first, which costs more than the aggregation itself. `progress(done, total)` counts blocks; it is
    called from this thread about ten times a second, and may raise to give up. `buffer_policy` says what becomes
    of integer buffers (`integers.py`). A GPU that is missing or out of memory becomes a warning.

    Raises `AggregationException` when the updates cannot be combined, naming the participant;
    `UpdateChanged` when a file is gone or was touched; OSError when the disk fails or is full.
    """
    inputs = Inputs(base, updates, strategy, state_in, buffer_policy, block)
    crew = thread_count(threads)

    def run(on: torch.device) -> Aggregated:
        with ExitStack() as stack:
            round = Combination(stack, inputs)
            if verify:
                round.files.verify(crew)
            weights = round.weigh(round.survey(on, crew))
            layout = round.files.layout
            new_state = None
            if state_out is not None and (header := round.state.header(strategy)):
                new_state = Draft(state_out, *header)
                stack.callback(new_state.discard)
                round.state.begin(new_state)
            draft = Draft(out, layout.header, layout.size)
            stack.callback(draft.discard)
            round.combine(weights, draft, round.whole, on, crew, progress)
            if new_state is not None:
                new_state.publish()
            return Aggregated(
                draft.publish(),
                layout.size,
                len(updates),
                math.fsum(weights),
                [],
                strategy.state_dict(),
            )

    made, warnings = with_device(device, strategy, run)
    made.warnings.extend(warnings)
    return made


def with_device(
    wanted: str, strategy: Strategy[Any], run: Callable[[torch.device], MadeT]
) -> tuple[MadeT, list[str]]:
    """What `run` makes on that device, and warnings.

    Where the device has too little memory, also in the middle, it is made anew on the CPU, with the strategy as
    it was before.
    """
    where, warnings = resolve(wanted)
    before = {} if where.type == "cpu" else deepcopy(vars(strategy))
    with single_threaded_torch():
        try:
            return run(where), warnings
        except torch.OutOfMemoryError:
            if where.type == "cpu":
                raise
            warnings.append(f"{where} is out of memory; aggregated on the CPU")
        vars(strategy).clear()
        vars(strategy).update(before)
        return run(torch.device("cpu")), warnings
