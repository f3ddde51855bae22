"""Distances between updates, from the Gram matrix of (update - base).

An update so large that its products overflow is infinitely far from all others, itself included.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fl_server_core.exceptions import AggregationException

if TYPE_CHECKING:
    from torch import Tensor


def compared(gram: "Tensor | None") -> "Tensor":
    """The Gram matrix that a strategy with `needs_gram` is given."""
    if gram is None:
        raise AggregationException("this strategy compares the updates; it needs the base model")
    return gram


def squared_distances(gram: "Tensor") -> "Tensor":
    """(n, n), never negative; infinity for an update to itself: it is not its own neighbour."""
    squares = gram.diagonal()
    away = (squares[:, None] + squares[None, :] - 2 * gram).clamp(min=0)
    away.nan_to_num_(nan=math.inf, posinf=math.inf)
    return away.fill_diagonal_(math.inf)


def distances_from(gram: "Tensor", shares: Sequence[float]) -> list[float]:
    """Of each update from the point base + sum shares_k (update_k - base)."""
    usable = [k for k, share in enumerate(shares) if share > 0]
    point = gram.new_tensor([shares[k] for k in usable])
    across = gram[:, usable] @ point
    square = across[usable] @ point
    away = (gram.diagonal() - 2 * across + square).clamp(min=0)
    return [float(value) for value in away.sqrt().nan_to_num_(nan=math.inf, posinf=math.inf)]


def norms(gram: "Tensor") -> list[float]:
    """Length of each update's way from the base."""
    return distances_from(gram, [0.0] * len(gram))


def median(values: Sequence[float]) -> float:
    """The lower of the two middle ones where there are two: a limit that half of the values keep."""
    return sorted(values)[(len(values) - 1) // 2]


def move(x: "Tensor", y: "Tensor", share: float) -> "Tensor":
    """x + share (y - x), where a coordinate that did not move keeps its bytes, minus zero included.

    A share within rounding of 1 is 1, so that updates that are alike give back their own bytes.
    """
    return y if share > 1 - 1e-12 else x - (x - y) * share


def stride(x: "Tensor", y: "Tensor", factor: float) -> "Tensor":
    """x + factor (y - x) for any factor; y itself where the factor is 1, but for rounding."""
    return y if abs(factor - 1) < 1e-12 else x - (x - y) * factor


def shorten(length: float, limit: float) -> float:
    """The part of a way that stays within the limit; all of it if there is no way to go."""
    return 1.0 if length <= limit else limit / length


def within_reach(gram: "Tensor") -> list[bool]:
    """Which updates are small enough to be compared."""
    return [math.isfinite(square) for square in gram.diagonal().tolist()]
