"""Aggregate weight files into one, in blocks: memory does not grow with the number of updates."""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fl_server_ai.aggregation.beside import Extras
from fl_server_ai.aggregation.blocks import FLOATS, Draft, UpdateChanged, UpdateFile
from fl_server_ai.aggregation.crew import Progress, run_all
from fl_server_ai.aggregation.device import resolve, single_threaded_torch, thread_count
from fl_server_ai.aggregation.distances import of_distances, suffices
from fl_server_ai.aggregation.files import Files
from fl_server_ai.aggregation.gram import inner_products
from fl_server_ai.aggregation.integers import POLICIES
from fl_server_ai.aggregation.largest import largest
from fl_server_ai.aggregation.masks import Masks
from fl_server_ai.aggregation.state import State
from fl_server_ai.aggregation.step import Step, overrides
from fl_server_ai.aggregation.strategy import Strategy, UpdateMeta
from fl_server_core.exceptions import AggregationException

__all__ = ["Aggregated", "UpdateChanged", "UpdateFile", "aggregate"]

BLOCK = 131072  # numbers; 512 KiB of float32, the fastest measured (benchmarks/aggregation.py)


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

    Sizes and modification times are compared before and after; `verify` also compares every file with its
    `sha256` first, which costs more than the aggregation itself. `progress(done, total)` counts blocks; it is
    called from this thread about ten times a second, and may raise to give up. `buffer_policy` says what becomes
    of integer buffers (`integers.py`). A GPU that is missing or out of memory becomes a warning.

    Raises `AggregationException` when the updates cannot be combined, naming the participant;
    `UpdateChanged` when a file is gone or was touched; OSError when the disk fails or is full.
    """
    if buffer_policy not in POLICIES:
        raise AggregationException(f"buffer policy {buffer_policy!r}: one of {', '.join(POLICIES)}")
    ordered = sorted(updates, key=lambda update: update.meta.participant)
    _check([update.meta for update in ordered], strategy)
    where, warnings = resolve(device)
    scalars = strategy.state_dict()
    needs_base = (
        overrides(strategy, "update")
        or strategy.needs_gram
        or strategy.needs_largest
        or strategy.may_keep
        or buffer_policy == "keep"
        or any(update.tensors is not None for update in ordered)
    )
    stale = strategy.rebases and any(update.start is not None for update in updates)
    if base is None and (needs_base or stale):
        raise AggregationException("this strategy, buffer policy or update needs the base model")
    with single_threaded_torch(), ExitStack() as stack:
        files = Files(stack, base, ordered, rebase=strategy.rebases)
        crew = thread_count(threads)
        if verify:
            files.verify(crew)

        def run(on: torch.device) -> tuple[str, float]:
            paths = _Paths(out, state_in, state_out)
            return _run(files, strategy, buffer_policy, on, block, crew, paths, progress)

        try:
            digest, total = run(where)
        except torch.OutOfMemoryError:
            if where.type == "cpu":
                raise
            warnings.append(f"{where} is out of memory; aggregated on the CPU")
            strategy.load_state_dict(scalars)
            digest, total = run(torch.device("cpu"))
        return Aggregated(
            digest, files.layout.size, len(ordered), total, warnings, strategy.state_dict()
        )


@dataclass(frozen=True)
class _Paths:
    out: Path
    state_in: Path | None
    state_out: Path | None


def _check(metas: Sequence[UpdateMeta], strategy: Strategy[Any]) -> None:
    if not metas:
        raise AggregationException("there are no updates")
    if len(metas) < strategy.fewest():
        raise AggregationException(
            f"{type(strategy).__name__} with {strategy.options} needs at least {strategy.fewest()} "
            f"updates ({strategy.assumes}), there are {len(metas)}"
        )
    for meta in metas:
        n: object = meta.num_examples
        if not isinstance(n, int) or isinstance(n, bool) or n < 1:
            raise AggregationException(
                f"participant {meta.participant} claims {n!r} examples: not a whole number from 1"
            )
        if not 0 < meta.discount <= 1:
            raise AggregationException(
                f"participant {meta.participant} has the discount {meta.discount}: not in (0, 1]"
            )
    for meta, following in pairwise(metas):
        if meta.participant == following.participant:
            raise AggregationException(f"participant {meta.participant} has two updates")


def _run(
    files: Files,
    strategy: Strategy[Any],
    policy: str,
    device: torch.device,
    block: int,
    threads: int,
    paths: _Paths,
    progress: Progress | None,
) -> tuple[str, float]:
    """Digest of the result, and the sum of the weights."""
    floats = [run for run in files.layout.runs if run.dtype in FLOATS]
    with ExitStack() as stack:
        state = State(strategy, floats, paths.state_in, paths.state_out)
        stack.callback(state.close)
        gram = None
        if strategy.needs_gram and files.base is not None:
            if strategy.needs_distances and suffices(floats, len(files.sources), device):
                gram = of_distances(files.sources, device, floats, threads)
            else:
                gram = inner_products(files.base, files.sources, device, floats, threads)
        metas = [update.meta for update in files.updates]
        if strategy.needs_largest and files.base is not None:
            found = largest(files.base, files.sources, device, floats, threads, block)
            metas = [replace(meta, largest=far) for meta, far in zip(metas, found, strict=True)]
        weights = _weights(strategy, metas, gram)
        used = [index for index, weight in enumerate(weights) if weight > 0]
        state.begin(strategy)
        per_tensor = [extra.name for extra in strategy.extras() if extra.per_tensor]
        extras = Extras(stack, files.updates, per_tensor, floats)
        masks = Masks(stack, files.updates)
        draft = Draft(paths.out, files.layout.header, files.layout.size)
        stack.callback(draft.discard)
        step = Step(
            files,
            strategy,
            policy,
            device,
            block,
            draft,
            state,
            floats,
            [files.sources[index] for index in used],
            [weights[index] for index in used],
            [files.updates[index].tensors for index in used],
            extras,
            masks,
        )
        run_all(step.jobs(), threads, step.worker, progress)
        files.assert_unchanged()
        extras.assert_unchanged()
        masks.assert_unchanged()
        state.publish()
        return draft.publish(), math.fsum(weights)


def _weights(
    strategy: Strategy[Any], metas: Sequence[UpdateMeta], gram: Tensor | None
) -> list[float]:
    weights = list(strategy.weights(metas, gram))
    if len(weights) != len(metas) or not all(
        math.isfinite(weight) and weight >= 0 for weight in weights
    ):
        raise AggregationException(f"the strategy's weights are not usable: {weights}")
    if math.fsum(weights) <= 0 and not strategy.may_keep:
        raise AggregationException("all updates have weight zero")
    if all(meta.discount == 1 for meta in metas):
        return weights  # whole numbers stay whole
    return [weight * meta.discount for weight, meta in zip(weights, metas, strict=True)]
