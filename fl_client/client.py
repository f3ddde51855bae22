"""What a site writes: a subclass of `Client`, and the small things that pass through it."""

import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from fl_client.errors import Stopped

Weights = dict[str, Any]  # names to NumPy arrays; to torch tensors where NumPy lacks the dtype
ReportErrors = Literal["type", "text", "traceback"]
_TAIL = 4000  # characters


@dataclass
class FitResult:
    """Weights after local training: the names and shapes that were handed out.

    `num_examples` is how many examples they were trained on and weighs them in the average;
    `num_steps` is the number of optimiser steps, for strategies that normalise by it. `extras` is what the
    strategy wants beside the weights, by name: a number, or arrays by tensor name, as in
    `{"prox.loss": 0.3, "scaffold.dc": {"layer.weight": ...}}`. `metadata` says what the weights are if not
    whole ones (`kind`, `encoding`); `fl_client.encodings` makes both.
    """

    weights: Mapping[str, Any]
    num_examples: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    num_steps: int | None = None
    extras: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass
class EvaluateResult:
    """Metrics of the global model on local data; `num_examples` weighs them in the mean."""

    metrics: Mapping[str, float]
    num_examples: int


@dataclass
class SwagResult:
    """Running means of the weights and of their squares, by tensor name, over the same steps.

    `deviations`, where the task's config has a `swag_rank`: weights minus mean of 2 to that many steps for each
    tensor of `second`, stacked along a first dimension.
    """

    first: Mapping[str, Any]
    second: Mapping[str, Any]
    num_examples: int
    deviations: Mapping[str, Any] | None = None


class Context:
    """The task at hand (`task`, as the server sent it), and a line back while it is worked on.

    `extras` is what the strategy sends beside the weights, arrays by name and tensor: `{"scaffold.c": {...}}`.
    `folder` is this site's own for this training, kept from round to round.
    """

    def __init__(
        self,
        task: dict[str, Any],
        report: Callable[[dict[str, Any]], dict[str, Any]],
        interval: float = 5.0,
        extras: Mapping[str, Mapping[str, Any]] | None = None,
        folder: Path = Path(),
    ) -> None:
        self.task = task
        self.deadline = task.get("deadline")
        self.extras = dict(extras or {})
        self.folder = folder
        self._report = report
        self._interval = interval
        self._last: float | None = None

    def progress(self, step: int, of: int, metrics: Mapping[str, float] | None = None) -> None:
        """Tell how far it is; call it as often as you like, every few seconds one call is sent.

        Raises Stopped if the server no longer wants the result. A server that cannot be
        reached is not an error here.
        """
        now = time.monotonic()
        if self._last is not None and now - self._last < self._interval and step < of:
            return
        self._last = now
        answer = self._report({"step": step, "of": of, "metrics": dict(metrics or {})})
        self.deadline = answer.get("deadline", self.deadline)
        if answer.get("command") == "stop":
            raise Stopped(f"the server stopped task {self.task['id']}")


class Client:
    """Subclass this. One method runs at a time; an exception fails the task, not the program.

    Set `share_raw_model = False` to refuse trainings with daisy chaining, in which the model that this
    site has trained goes to another site before it is averaged with others.
    """

    share_raw_model = True
    # What trainings may require of a site: said when `run` begins, if there is anything to say.
    attributes: Mapping[str, Any] = MappingProxyType({})
    num_examples: int | None = None

    def initial_weights(self, config: dict[str, Any], context: Context) -> Weights:
        """Arrays by name to begin a training with, for a model that was made without any."""
        raise NotImplementedError(f"{type(self).__name__} has no initial weights")

    def fit(self, weights: Weights, config: dict[str, Any], context: Context) -> FitResult:
        """Train from `weights` on local data. The arrays are yours to change.

        `config` is what the strategy wants known, such as `{"mu": 0.01}` for FedProx. Floating
        results are cast to the dtypes that were handed out.
        """
        raise NotImplementedError(f"{type(self).__name__} does not train")

    def evaluate(
        self, weights: Weights, config: dict[str, Any], context: Context
    ) -> EvaluateResult:
        """Measure `weights` on local data; `config["metric_names"]`, if given, says what."""
        raise NotImplementedError(f"{type(self).__name__} does not evaluate")

    def swag(self, weights: Weights, config: dict[str, Any], context: Context) -> SwagResult:
        """Train a little from `weights` and tell how they move: `SwagCollector` does the sums.

        `config["swag_rank"]`, if given, is how many deviations the server takes: the collector's `rank`.
        """
        raise NotImplementedError(f"{type(self).__name__} collects no moments")

    def describe_failure(self, error: Exception) -> tuple[str, str] | None:
        """What the server is told about an exception: a text, and the end of a log.

        None, the default, leaves it to `run`'s `report_errors`. Override it to say more about those
        exceptions whose messages you know: others may quote patients' data or local paths.
        """
        return None


def described(error: Exception, report: ReportErrors) -> tuple[str, str]:
    """Text and log for the server: no more than `report` allows to leave the site."""
    kind = type(error).__name__[:_TAIL]
    if report == "type":
        return kind, ""
    text = f"{kind}: {error}"[:_TAIL]
    if report == "text":
        return text, ""
    frames = traceback.extract_tb(error.__traceback__)
    tail = "\n".join(f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames)
    return text, tail[-_TAIL:]
