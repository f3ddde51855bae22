"""Distances between updates, from the Gram matrix of (update - base).

An update so large that its products overflow is infinitely far from all others, itself included.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


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
    """x + share (y - x), where a coordinate that did not move keeps its bytes, minus zero included."""
    return y if share == 1 else x - (x - y) * share
