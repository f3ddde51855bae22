"""A fake server with a model, and a site whose training is easy to predict."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from fl_client import Client, Context, EvaluateResult, FitResult
from tests.client.fake_server import FakeServer


class Site(Client):
    """Adds one to every weight, and counts."""

    def __init__(self) -> None:
        self.fits = 0
        self.configs: list[dict[str, Any]] = []

    def fit(self, weights: dict[str, Any], config: dict[str, Any], context: Context) -> FitResult:
        self.fits += 1
        self.configs.append(config)
        return FitResult({n: w + 1 for n, w in weights.items()}, 7, {"loss": 0.5}, num_steps=3)

    def evaluate(
        self, weights: dict[str, Any], config: dict[str, Any], context: Context
    ) -> EvaluateResult:
        return EvaluateResult({"accuracy": 0.25}, 11)


@pytest.fixture
def site() -> Site:
    return Site()


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as fake:
        fake.add_model({"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.float32([9])})
        yield fake
