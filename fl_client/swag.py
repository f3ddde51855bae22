"""Moments of the weights along local training, as a SWAG round asks for: https://arxiv.org/abs/1902.02476."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fl_client.client import SwagResult

if TYPE_CHECKING:
    import numpy as np


class SwagCollector:
    """Means of w and of w*w over the steps at which `add` was called; float64, two models in memory.

    Call `add(weights)` with names to arrays or torch tensors, from some point of training on, every so
    many steps; what is not floating is left out. Then return `result(num_examples)` from `Client.swag`.
    """

    def __init__(self) -> None:
        self.steps = 0
        self._first: dict[str, np.ndarray[Any, Any]] = {}
        self._second: dict[str, np.ndarray[Any, Any]] = {}

    def add(self, weights: Mapping[str, Any]) -> None:
        """Count the weights as they are now."""
        self.steps += 1
        for name, value in weights.items():
            array = _floats(value)
            if array is None:
                continue
            for means, now in ((self._first, array), (self._second, array * array)):
                mean = means.setdefault(name, now * 0.0)
                mean += (now - mean) / self.steps

    def result(self, num_examples: int) -> SwagResult:
        """What has been collected; ValueError if nothing has."""
        if not self.steps:
            raise ValueError("call add(weights) at least once before result()")
        return SwagResult(self._first, self._second, num_examples)


def _floats(value: Any) -> np.ndarray[Any, Any] | None:
    import numpy as np  # not needed by those who collect no moments

    if hasattr(value, "detach"):  # a torch tensor; bfloat16 has no NumPy dtype
        value = value.detach().cpu()
        if not value.is_floating_point():
            return None
        value = value.double().numpy()
    array = np.asarray(value)
    return array.astype(np.float64) if array.dtype.kind == "f" else None
