"""The open files of one round and the passes over them: comparing the updates, weighing them, combining columns."""

import hashlib
import json
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
from fl_server_ai.aggregation.blocks import FLOATS, Run, Target, UpdateFile
from fl_server_ai.aggregation.compiled import prepare
from fl_server_ai.aggregation.crew import Progress, run_all
from fl_server_ai.aggregation.distances import partial_distances, suffices
from fl_server_ai.aggregation.dtypes import BUFFER_POLICIES
from fl_server_ai.aggregation.files import Files
from fl_server_ai.aggregation.gram import STRIPES, Beside, partial_products, total
from fl_server_ai.aggregation.largest import largest
from fl_server_ai.aggregation.masks import Masks
from fl_server_ai.aggregation.state import State
from fl_server_ai.aggregation.step import Span, Step, overrides
from fl_server_ai.aggregation.strategy import Strategy, UpdateMeta
from fl_server_core.exceptions import AggregationException

BLOCK = 131072  # numbers; 512 KiB of float32, the fastest measured (benchmarks/aggregation.py)


@dataclass(frozen=True)
class Inputs:
    """What is combined, and how; the arguments of `engine.aggregate` of the same names."""

    base: Path | None
    updates: Sequence[UpdateFile]
    strategy: Strategy[Any]
    state_in: Path | None = None
    buffer_policy: str = "mean"
    block: int = BLOCK


@dataclass(frozen=True)
class Survey:
    """What the updates have to be compared by, before they are weighed; of a share, what belongs to it.

    `gram` holds (n, n) float64 partial sums by stripe; `largest` a number for each update.
    """

    gram: dict[int, Tensor] = field(default_factory=dict)
    largest: list[float] = field(default_factory=list)

    @staticmethod
    def joined(shares: Sequence["Survey"]) -> "Survey":
        gram = {index: part for one in shares for index, part in one.gram.items()}
        found = [one.largest for one in shares if one.largest]
        return Survey(gram, [max(column) for column in zip(*found, strict=True)])


class Combination:
    """Opened on construction, closed by `stack`. Raises `AggregationException` for what cannot be combined."""

    def __init__(self, stack: ExitStack, inputs: Inputs) -> None:
        if inputs.buffer_policy not in BUFFER_POLICIES:
            raise AggregationException(
                f"buffer policy {inputs.buffer_policy!r}: one of {', '.join(BUFFER_POLICIES)}"
            )
        ordered = sorted(inputs.updates, key=lambda update: update.meta.participant)
        _check([update.meta for update in ordered], inputs.strategy)
        if inputs.base is None and _needs_base(inputs):
            raise AggregationException(
                "this strategy, buffer policy or update needs the base model"
            )
        self.inputs = inputs
        self.strategy = inputs.strategy
        self.files = Files(stack, inputs.base, ordered, rebase=_rebases(inputs.strategy))
        self.floats = [run for run in self.files.layout.runs if run.dtype in FLOATS]
        locate = self.files.layout.locate
        self.state = State(self.strategy, self.floats, inputs.state_in, locate, len(ordered))
        stack.callback(self.state.close)
        per_tensor = [extra.name for extra in self.strategy.extras() if extra.per_tensor]
        self.extras = Extras(stack, ordered, per_tensor, self.floats)
        self.masks = Masks(stack, ordered)

    @property
    def whole(self) -> list[Span]:
        """All columns."""
        return [(0, run.count) for run in self.files.layout.runs]

    def survey(self, device: torch.device, threads: int, share: int = 0, of: int = 1) -> Survey:
        """The pass that the strategy needs before it can weigh; nothing is read where it needs none."""
        self._prepare(device)
        base, sources = self.files.base, self.files.sources
        gram: dict[int, Tensor] = {}
        found: list[float] = []
        if self.strategy.needs_gram and base is not None:
            mine = range(STRIPES)[share::of]
            # Stripes of the one kind may be summed with stripes of the other: both hold the distances.
            if self.strategy.needs_distances and suffices(self.floats, len(sources), device):
                gram = partial_distances(sources, device, self.floats, threads, mine)
            else:
                beside = self._beside(device)
                gram = partial_products(base, sources, device, self.floats, threads, mine, beside)
        if self.strategy.needs_largest and base is not None:
            block = self.inputs.block
            found = largest(base, sources, device, self.floats, threads, block, share, of)
        return Survey(gram, found)

    def _prepare(self, device: torch.device) -> None:
        if device.type == "cpu":
            prepare(sum(run.count for run in self.floats) * len(self.files.sources))

    def _beside(self, device: torch.device) -> Beside | None:
        name, floats, state = self.strategy.gram_block, self.floats, self.state

        def read(run: Run, start: int, count: int) -> Tensor:
            return state.read(floats.index(run), start, count, device)[name]

        return read if name else None

    def weigh(self, survey: Survey) -> list[float]:
        """The strategy's weights, each with its discount. Asked once: strategies count what they saw."""
        metas = [update.meta for update in self.files.updates]
        if survey.largest:
            pairs = zip(metas, survey.largest, strict=True)
            metas = [replace(meta, largest=far) for meta, far in pairs]
        gram = total(survey.gram) if survey.gram else None
        return _weights(self.strategy, metas, gram)

    def recipe(self, weights: Sequence[float]) -> str:
        """SHA-256 over what every worker of a round must come to alike: layout, weights, scalars."""
        said = json.dumps(
            [[weight.hex() for weight in map(float, weights)], self.strategy.state_dict()],
            sort_keys=True,
        )
        return hashlib.sha256(self.files.layout.header + said.encode()).hexdigest()

    def combine(
        self,
        weights: Sequence[float],
        target: Target,
        spans: Sequence[Span],
        device: torch.device,
        threads: int,
        progress: Progress | None = None,
    ) -> None:
        """Write these columns of the result to `target`, and of the state to where `state` began.

        `UpdateChanged` if any file was touched meanwhile.
        """
        self._prepare(device)
        used = [index for index, weight in enumerate(weights) if weight > 0]
        step = Step(
            self.files,
            self.strategy,
            self.inputs.buffer_policy,
            device,
            self.inputs.block,
            target,
            self.state,
            self.floats,
            [self.files.sources[index] for index in used],
            [weights[index] for index in used],
            [self.files.updates[index].tensors for index in used],
            self.extras,
            self.masks,
            threads,
        )
        run_all(step.jobs(spans), threads, step.worker, progress)
        self.assert_unchanged()

    def assert_unchanged(self) -> None:
        """`UpdateChanged` if a file was touched since it was opened."""
        self.files.assert_unchanged()
        self.extras.assert_unchanged()
        self.masks.assert_unchanged()
        self.state.assert_unchanged()


def _rebases(strategy: Strategy[Any]) -> bool:
    return strategy.rebases and strategy.takes == "weights"


def _needs_base(inputs: Inputs) -> bool:
    strategy = inputs.strategy
    return (
        overrides(strategy, "update")
        or strategy.needs_gram
        or strategy.needs_largest
        or strategy.may_keep
        or inputs.buffer_policy == "keep"
        or any(update.tensors is not None for update in inputs.updates)
        or (_rebases(strategy) and any(update.start is not None for update in inputs.updates))
    )


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
