"""From the outputs of the draws to the answer, without keeping the draws."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fl_server_ai.uncertainty.answer import Answer, refuse_non_finite
from fl_server_ai.uncertainty.distributions import (
    CLASS_DIM,
    Distribution,
    from_logits,
    from_probs,
    if_probs,
    refuse_shape,
)
from fl_server_ai.uncertainty.options import CommonOptions
from fl_server_ai.uncertainty.quantiles import weighted_quantiles
from fl_server_ai.uncertainty.spread import Entropies, Spread, Weights
from fl_server_core.exceptions import Invalid, Unusable


def plain_answer(outputs: Tensor, task: str) -> Answer:
    """Method NONE: one run, and `uncertainty` is empty.

    `multiclass`: index of the largest along dimension 1, the first of equals, int64. Other tasks: the outputs
    in their own dtype, whatever `output` says.
    """
    refuse_shape(outputs, task)
    refuse_non_finite(outputs, "the output", masked=task == "multiclass")
    return Answer(outputs.argmax(dim=CLASS_DIM) if task == "multiclass" else outputs, {})


class Summary:
    """What all other methods answer: mean over the draws, `variance`, `std`, entropies or quantiles.

    Outputs of one draw are (batch, ...): (batch, classes, ...) for `multiclass`, (batch,) or (batch, 1) for
    `binary`; any dtype, counted in float64 and answered in it. What is averaged:

    - `output: logits` or `softmax: true`: softmax over dimension 1 for `multiclass`, else sigmoid;
    - `output: probs`: the outputs, which must be probabilities (NOT_PROBABILITIES otherwise);
    - neither, and always for `regression`: the outputs as they come.

    Entropies are added for the first two, and for undeclared `multiclass` outputs if every sample of every
    draw sums to one. They have the shape of the inference without dimension 1 for `multiclass`; for
    `multilabel` and `binary` each output has its own. `regression` gets `quantile_0.05` and so on instead;
    these alone need all draws in memory.
    """

    def __init__(self, options: CommonOptions) -> None:
        self._options = options
        self._weights = Weights()
        self._spread: Spread | None = None
        self._entropies: Entropies | None = None
        self._kept: list[tuple[Tensor, float]] = []
        self._shape: torch.Size | None = None

    def add(self, outputs: Tensor, weight: float = 1.0) -> None:
        """Take one draw; a weight of 0 leaves it out. Weights need not sum to one.

        Raises NON_FINITE_OUTPUT, NOT_PROBABILITIES (both with the sample) or OUTPUT_SHAPE.
        """
        if not (math.isfinite(weight) and weight >= 0):
            raise Invalid(f"a draw cannot have weight {weight}", code="BAD_WEIGHT")
        if weight == 0:
            return
        refuse_shape(outputs, self._options.task)
        if self._shape not in (None, outputs.shape):
            raise Unusable(
                f"draws differ in shape: {tuple(outputs.shape)} after {tuple(self._shape or ())}",
                code="OUTPUT_SHAPE",
            )
        refuse_non_finite(outputs, "the output", masked=self._options.reads_logits)
        values, distribution = self._read(outputs)
        refuse_non_finite(values, "the probabilities")
        share = self._weights.add(weight)
        if self._shape is None or self._spread is None:
            self._shape = outputs.shape
            self._spread = Spread(values)
            self._entropies = Entropies(distribution) if distribution else None
        self._spread.add(values, weight, share)
        if distribution is None:
            self._entropies = None  # for good: what once did not sum to one is no probability
        elif self._entropies is not None:
            self._entropies.add(distribution, share)
        if self._options.task == "regression" and self._options.quantiles:
            self._kept.append((outputs.clone(), weight))

    def answer(self) -> Answer:
        """The answer so far; more draws may follow."""
        if self._spread is None:
            raise Invalid("there is no draw with a weight above 0", code="NO_DRAWS")
        variance = self._spread.variance(self._weights)
        uncertainty = {"variance": variance, "std": variance.sqrt()}
        if self._entropies is not None:
            uncertainty |= self._entropies.result()
        if self._kept:
            draws = torch.stack([draw for draw, _ in self._kept])
            weights = torch.tensor([weight for _, weight in self._kept], dtype=torch.float64)
            levels = self._options.quantiles
            found = weighted_quantiles(draws, weights.to(draws.device), levels)
            names = [f"quantile_{level}" for level in levels]
            uncertainty |= dict(zip(names, found, strict=True))
        return Answer(self._spread.mean(), uncertainty)

    def _read(self, outputs: Tensor) -> tuple[Tensor, Distribution | None]:
        """What to average, and the distribution whose entropy counts."""
        options = self._options
        if options.reads_logits:
            distribution = from_logits(outputs, options.task)
            if options.task == "multiclass":
                return distribution.probs.movedim(-1, CLASS_DIM), distribution
            return distribution.probs[..., 1], distribution
        if options.reads_probs:
            return outputs.double(), from_probs(outputs, options.task)
        undeclared = options.task == "multiclass"
        return outputs.double(), if_probs(outputs) if undeclared else None


def summarise(
    draws: Iterable[Tensor] | Tensor,
    options: CommonOptions,
    weights: Sequence[float] | None = None,
) -> Answer:
    """`Summary` of all draws at once: (T, batch, ...) or T tensors, with one weight each or all alike.

    With the members' weights this is the ensemble's mixture (https://arxiv.org/abs/1612.01474).
    """
    summary = Summary(options)
    draws = list(draws)
    if weights is not None and len(weights) != len(draws):
        raise Invalid(f"{len(draws)} draws and {len(weights)} weights", code="BAD_WEIGHT")
    for draw, weight in zip(draws, weights or [1.0] * len(draws), strict=True):
        summary.add(draw, weight)
    return summary.answer()
