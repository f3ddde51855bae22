"""Integer and bool buffers (counters, quantised tables): combined exactly, by a declared policy.

======  =====================================================================================
mean    weighted mean, halves to the even neighbour, exact at any size; bool: weighted majority,
        a tie keeps the base's value, or is True where there is no base
max     the largest value; bool: True if any is
keep    the base's value
======  =====================================================================================
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

DTYPES = {
    "BOOL": np.bool_,
    **{f"U{bits}": getattr(np, f"uint{bits}") for bits in (8, 16, 32, 64)},
    **{f"I{bits}": getattr(np, f"int{bits}") for bits in (8, 16, 32, 64)},
}
Array = NDArray[Any]


def combine(rows: Array, weights: Sequence[float], policy: str, base: Array | None) -> Array:
    """(updates, block) to (block,), same dtype.

    Weights that are no integers, and sums over 62 bits, are worked out in Python's integers: the same
    rule, at about a tenth of a microsecond for each number read.
    """
    if policy == "keep":
        if base is None:
            raise ValueError('the policy "keep" needs the base')
        return base.copy()
    if policy == "max":
        return np.asarray(rows.max(axis=0))
    scaled = _whole(weights)
    if rows.dtype == np.bool_:
        return _majority(rows, scaled, base)
    largest = max(1, abs(int(rows.max(initial=0))), abs(int(rows.min(initial=0))))
    if 2 * largest * sum(scaled) < 2**62:
        total = np.zeros(rows.shape[1], dtype=np.int64)
        for row, weight in zip(rows, scaled, strict=True):
            total += row.astype(np.int64) * weight
        return _half_even(total, sum(scaled)).astype(rows.dtype)
    totals = (rows.astype(object) * np.array(scaled, dtype=object)[:, None]).sum(axis=0)
    return np.asarray(_half_even(totals, sum(scaled)).astype(rows.dtype))


def _whole(weights: Sequence[float]) -> list[int]:
    """Integers in the same proportions, exactly."""
    ratios = [Fraction(weight) for weight in weights]
    common = math.lcm(*(ratio.denominator for ratio in ratios))
    return [int(ratio * common) for ratio in ratios]


def _half_even(totals: NDArray[Any], divisor: int) -> NDArray[Any]:
    quotient, rest = totals // divisor, totals % divisor
    up = (2 * rest > divisor) | ((2 * rest == divisor) & (quotient % 2 == 1))
    return np.asarray(quotient + up.astype(quotient.dtype))


def _majority(rows: Array, weights: Sequence[int], base: Array | None) -> Array:
    total = sum(weights)
    votes = (rows.astype(object) * np.array(weights, dtype=object)[:, None]).sum(axis=0) * 2
    tie = np.ones(rows.shape[1], dtype=np.bool_) if base is None else base
    return np.where(votes == total, tie, votes > total).astype(np.bool_)
