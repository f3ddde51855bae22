"""Moments of the weights along local training, as a SWAG round asks for: https://arxiv.org/abs/1902.02476."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fl_client.arrays import floats_of
from fl_client.client import SwagResult

if TYPE_CHECKING:
    import numpy as np


class SwagCollector:
    """Means of w and of w*w over the steps at which `add` was called; float64, two models in memory.

    With a `rank` of 2 or more the weights of the last `rank` steps are kept too, as float32, for their deviations
    from the mean: give it the task's, `SwagCollector(rank=config.get("swag_rank", 0))`.

    Call `add(weights)` with names to arrays or torch tensors, from some point of training on, every so
    many steps; what is not floating is left out. Then return `result(num_examples)` from `Client.swag`.
    """

    def __init__(self, rank: int = 0) -> None:
        self.steps = 0
        self._last: deque[dict[str, np.ndarray[Any, Any]]] = deque(maxlen=rank)
        self._first: dict[str, np.ndarray[Any, Any]] = {}
        self._second: dict[str, np.ndarray[Any, Any]] = {}

    def add(self, weights: Mapping[str, Any]) -> None:
        """Count the weights as they are now."""
        self.steps += 1
        kept: dict[str, np.ndarray[Any, Any]] = {}
        for name, value in weights.items():
            numbers = floats_of(value)
            if numbers is None:
                continue
            array = numbers.astype("float64")
            for means, now in ((self._first, array), (self._second, array * array)):
                mean = means.setdefault(name, now * 0.0)
                mean += (now - mean) / self.steps
            if self._last.maxlen:
                kept[name] = array.astype("float32")
        self._last.append(kept)

    def result(self, num_examples: int) -> SwagResult:
        """What has been collected; ValueError if nothing has."""
        if not self.steps:
            raise ValueError("call add(weights) at least once before result()")
        return SwagResult(self._first, self._second, num_examples, self._deviations())

    def _deviations(self) -> dict[str, np.ndarray[Any, Any]] | None:
        """From the final mean, unlike the paper's: with all steps kept, D D^T / (K - 1) is their covariance."""
        import numpy as np

        if len(self._last) < 2:
            return None
        found = {}
        for name, mean in self._first.items():
            found[name] = np.empty((len(self._last), *mean.shape), np.float32)
            for row, kept in zip(found[name], self._last, strict=True):
                row[...] = kept[name] - mean
        return found
