"""Weighted means of float64, which has no wider type to add in.

Each product and sum carries its rounding error along in a second float64 (double-double: Dekker 1971), at less
than a tenth of the speed.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fl_server_ai.aggregation.rounding import UNIT

VELTKAMP = 2.0**27 + 1
SHRINK = 2.0**-64  # room for VELTKAMP, and for the sum of as many numbers as there can be updates
TINY = 2.0**-850  # what is smaller has bits that may not survive that


@dataclass(frozen=True)
class Divisor:
    """A sum of weights, `value + tail`, but for a few units of `noise` at most: one for all numbers, or one for each."""

    value: float | Tensor
    tail: float | Tensor
    noise: float | Tensor


def sum_of(weights: Sequence[float]) -> Divisor:
    """Of all of them, whatever the number."""
    value = math.fsum(weights)
    tail = math.fsum([*weights, -value])  # what the sum of fractional weights was rounded by
    return Divisor(value, tail, abs(tail))


def sum_over(sent: Iterable[Tensor], weights: Sequence[float]) -> Divisor:
    """For each number of those that sent it, by a mask each; 1 where there is none. A scalar stands for all numbers."""
    high = low = noise = torch.zeros((), dtype=torch.float64)
    for here, weight in zip(sent, weights, strict=True):
        high, rounded = two_sum(high, here.to(torch.float64) * weight)
        low, noise = low + rounded, noise + rounded.abs()
    value, tail = two_sum(torch.where(high == 0, 1.0, high), low)
    return Divisor(value, tail, noise)


def mean_of_float64(
    blocks: Callable[[], Iterator[Tensor]],
    weights: Sequence[float],
    divisor: Callable[[Sequence[float]], Divisor] = sum_of,
) -> tuple[Tensor, Tensor]:
    """Means, and the indices of those that may be rounded wrongly: about 106 bits in between did not do.

    Where it overflows on its way, the blocks are read again and divided by a power of two; in doubt is then, too,
    what loses bits by that.
    """
    mean, doubtful = _rounded(*mean_in_parts(blocks(), weights, divisor(weights)))
    finite = torch.isfinite(mean)
    if not bool(finite.all()):
        exponent = math.frexp(max(weights))[1]
        shares = [math.ldexp(weight, -exponent) for weight in weights]
        parts = mean_in_parts((block * SHRINK for block in blocks()), shares, divisor(shares))
        shrunk, unsure = _rounded(*parts)
        for block in blocks():
            unsure |= (block != 0) & (block.abs() < TINY)
        mean = torch.where(finite, mean, shrunk / SHRINK)
        doubtful = torch.where(finite, doubtful, unsure)
    return mean, (doubtful & torch.isfinite(mean)).nonzero().reshape(-1)


def _rounded(quotient: Tensor, part: Tensor, bound: Tensor) -> tuple[Tensor, Tensor]:
    doubtful = quotient + (part - bound) != quotient + (part + bound)
    return torch.where(part == 0, quotient, quotient + part), doubtful  # -0 + 0 would be 0


def mean_in_parts(
    blocks: Iterable[Tensor], weights: Sequence[float], divisor: Divisor
) -> tuple[Tensor, Tensor, Tensor]:
    """(quotient, part, bound) in float64: the exact means are quotient + part, but for `bound` at most."""
    high = low = noise = torch.zeros(())
    for index, (block, weight) in enumerate(zip(blocks, weights, strict=True)):
        product, error = two_product(block, float(weight))
        if index == 0:
            high, low, noise = product, error, error.abs()
            continue
        high, rounded = two_sum(high, product)
        low = low + (error + rounded)
        noise = noise + (error.abs() + rounded.abs())
    by = divisor.value
    quotient = high / by
    remainder = remainder_of(high, quotient, by)
    part = (remainder + low - quotient * divisor.tail) / by
    # Errors of the errors, and what underflows; there are none where a sum without any was divided without any.
    errors = noise + remainder.abs() + quotient.abs() * divisor.noise
    bound = errors * ((4 * len(weights) + 16) * UNIT / by) + 2.0**-1070
    product, error = two_product(part, by)
    exact = (noise == 0) & (product == remainder) & (error == 0) & (divisor.noise == 0)
    if not all(float(weight).is_integer() for weight in weights):
        exact &= quotient.abs() > TINY  # errors that underflow look like none
    return quotient, part, torch.where(exact, 0.0, bound)


def remainder_of(values: Tensor, quotient: Tensor, divisor: float | Tensor) -> Tensor:
    """`values - quotient * divisor`, exact where that is the quotient which is nearest."""
    product, error = two_product(quotient, divisor)
    return (values - product) - error


def two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """`a + b` and its rounding error (Knuth 1969)."""
    total = a + b
    other = total - a
    return total, (a - (total - other)) + (b - other)


def two_product(values: Tensor, factor: float | Tensor) -> tuple[Tensor, Tensor]:
    """`values * factor` and its rounding error (Dekker 1971, with Veltkamp's splitting)."""
    product = values * factor
    scaled = values * VELTKAMP
    high = scaled - (scaled - values)
    low = values - high
    factor_high = VELTKAMP * factor - (VELTKAMP * factor - factor)
    factor_low = factor - factor_high
    error = high * factor_high - product
    error = error + high * factor_low
    error = error + low * factor_high
    return product, error + low * factor_low
