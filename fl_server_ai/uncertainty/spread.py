"""Mean, variance and entropies of weighted draws, added up one draw at a time, in float64.

Mean and variance follow West 1979 (https://doi.org/10.1145/359146.359153), so nothing cancels.
"""

import torch
from torch import Tensor

from fl_server_ai.uncertainty.distributions import Distribution, entropy


class Weights:
    """The sum of the weights so far, and of their squares."""

    def __init__(self) -> None:
        self.total = 0.0
        self.squares = 0.0

    def add(self, weight: float) -> float:
        """The share of the new weight in the total."""
        self.total += weight
        self.squares += weight * weight
        return weight / self.total


class Spread:
    """Running mean and variance; three float64 numbers for each output, however many draws.

    What is added up is the distance from the first draw, so a small spread about a large mean is kept.
    """

    def __init__(self, first: Tensor) -> None:
        self._origin = first.to(torch.float64, copy=True)
        self._moved = torch.zeros_like(self._origin)
        self._squares = torch.zeros_like(self._origin)

    def add(self, values: Tensor, weight: float, share: float) -> None:
        distance = values - self._origin
        delta = distance - self._moved
        self._moved += delta * share
        self._squares += weight * delta * (distance - self._moved)

    def mean(self) -> Tensor:
        return self._origin + self._moved

    def variance(self, weights: Weights) -> Tensor:
        """Unbiased: divided by N - 1 for equal weights, by 1 - sum w^2 in general. One draw has 0."""
        freedom = weights.total - weights.squares / weights.total
        if freedom <= 0:  # one draw, or one so heavy that the others vanish beside it
            return torch.zeros_like(self._squares)
        return (self._squares / freedom).clamp(min=0.0)


class Entropies:
    """Of the mean distribution and of each draw: Houlsby et al. 2011, https://arxiv.org/abs/1112.5745."""

    def __init__(self, like: Distribution) -> None:
        self._probs = torch.zeros_like(like.probs)
        self._expected = torch.zeros_like(like.probs[..., 0])

    def add(self, draw: Distribution, share: float) -> None:
        self._probs += (draw.probs - self._probs) * share
        self._expected += (draw.entropy() - self._expected) * share

    def result(self) -> dict[str, Tensor]:
        """In nats. Rounding is not shown: no mutual information is below 0."""
        probs = self._probs.clamp(min=0.0)
        predictive = entropy(probs, probs.log())
        return {
            "predictive_entropy": predictive,
            "expected_entropy": self._expected.clone(),
            "mutual_info": (predictive - self._expected).clamp(min=0.0) + 0.0,
        }
