"""Outputs read as probabilities, together with logarithms that are exact where they are tiny."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fl_server_ai.uncertainty.answer import first_sample
from fl_server_core.exceptions import Unusable

CLASS_DIM = 1
HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Distribution:
    """Probabilities and their logarithms: (batch, ..., states), float64, summing to one at the end.

    multiclass: the states are the classes, moved to the end. multilabel and binary: each output is a
    distribution of its own, with the two states no and yes.
    """

    probs: Tensor
    log_probs: Tensor

    def entropy(self) -> Tensor:
        """(batch, ...), in nats; a state of probability 0 adds nothing."""
        return entropy(self.probs, self.log_probs)


def entropy(probs: Tensor, log_probs: Tensor) -> Tensor:
    """-sum p log p over the last dimension, with 0 log 0 = 0, and never below 0."""
    terms = torch.where(probs > 0, probs * log_probs, torch.zeros_like(probs))
    return (-terms.sum(dim=-1)).clamp(min=0.0) + 0.0  # -0.0 becomes 0.0


def refuse_shape(outputs: Tensor, task: str) -> None:
    """Raise OUTPUT_SHAPE for outputs that cannot belong to the task."""
    shape = tuple(outputs.shape)
    if outputs.is_complex():
        raise Unusable("complex outputs belong to no task", code="OUTPUT_SHAPE", shape=shape)
    if not shape:
        wanted = "(batch, ...)"
    elif task == "multiclass" and (len(shape) < 2 or shape[CLASS_DIM] == 0):
        wanted = "(batch, classes, ...); for one output a sample choose binary or regression"
    elif task == "binary" and len(shape) == 2 and shape[1] > 1:
        wanted = "(batch,) or (batch, 1); two or more outputs a sample are multiclass or multilabel"
    else:
        return
    raise Unusable(
        f"outputs of shape {shape} do not fit task {task}, which wants {wanted}",
        code="OUTPUT_SHAPE",
        shape=shape,
    )


def from_logits(outputs: Tensor, task: str) -> Distribution:
    """Softmax over dimension 1 for multiclass, else sigmoid. A logit of -inf is probability 0."""
    logits = outputs.double()
    if task == "multiclass":
        log_probs = logits.movedim(CLASS_DIM, -1).log_softmax(dim=-1)
    else:
        # logsigmoid(-inf) is -inf, logsigmoid(inf) is 0: right both times
        log_probs = torch.stack([logsigmoid(-logits), logsigmoid(logits)], dim=-1)
    return Distribution(log_probs.exp(), log_probs)


def from_probs(outputs: Tensor, task: str) -> Distribution:
    """Probabilities as given, each sample divided by its sum, which must be 1 but for rounding.

    Raises NOT_PROBABILITIES, naming the sample.
    """
    sample = first_sample(_not_probs(outputs, task))
    if sample is not None:
        raise Unusable(
            f"sample {sample}: the outputs are no probabilities (they lie outside 0 to 1, or do not "
            "sum to 1); if the model gives logits, say output: logits",
            code="NOT_PROBABILITIES",
            sample=sample,
        )
    return _normalised(outputs, task)


def if_probs(outputs: Tensor) -> Distribution | None:
    """The multiclass outputs as probabilities, if they are such in every sample."""
    if first_sample(_not_probs(outputs, "multiclass")) is not None:
        return None
    return _normalised(outputs, "multiclass")


def _not_probs(outputs: Tensor, task: str) -> Tensor:
    slack = 1e-2 if outputs.dtype in HALVES else 1e-3
    values = outputs.double()
    bad = ~((values >= -slack) & (values <= 1 + slack))
    if task == "multiclass":
        sums = values.sum(dim=CLASS_DIM, keepdim=True)
        bad = bad | ~((sums - 1).abs() <= slack)
    return bad


def _normalised(outputs: Tensor, task: str) -> Distribution:
    values = outputs.double().clamp(0.0, 1.0)
    if task == "multiclass":
        probs = values.movedim(CLASS_DIM, -1)
        probs = probs / probs.sum(dim=-1, keepdim=True)
    else:
        probs = torch.stack([1 - values, values], dim=-1)
    return Distribution(probs, probs.log())
