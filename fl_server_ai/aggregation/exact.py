"""Correct rounding of means: which float64 sums could round either way, and what the exact mean says of those.

A sum of float64 is off by at most a known part of its terms' sizes (Higham 2002, section 4.2). Where a number and what it
could be instead round to the same number of the narrower dtype, it is the right one. Of random numbers about one in
100,000 is not that sure, of those whose terms cancel more, and of a few updates that count alike each that lies exactly in the
middle of two numbers: the mean of two does so every third time. Most of these are sums without any error, which a look
at their terms shows; the rest takes sums of twice the precision, or of any. Where updates leave numbers out, only the divisor
is each number's own: what was not sent counts as zero.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import compress

import numpy as np
import torch
from torch import Tensor

from fl_server_ai.aggregation.double import (
    TINY,
    Divisor,
    mean_in_parts,
    remainder_of,
    sum_of,
    sum_over,
    two_product,
    two_sum,
)
from fl_server_ai.aggregation.rounding import UNIT, narrowed

UNDERFLOW = 2.0**-60  # the square of what is smaller may vanish from a float32
FEW = 64  # terms that cost less one by one
EXACT_WEIGHT = 2**29  # times a 24-bit significand fits into the 53 bits of a float64


def exact_products(weights: Sequence[float]) -> bool:
    """Whether float64 holds their products with numbers of at most 24 bits."""
    return all(weight < EXACT_WEIGHT and weight == int(weight) for weight in weights)


def in_small_numbers(weights: Sequence[float]) -> Sequence[float]:
    """The same shares as the smallest whole numbers, where their products are exact then; else `weights`."""
    ratios = [float(weight).as_integer_ratio() for weight in weights]
    below = max(denominator for _, denominator in ratios)
    whole = [above * (below // denominator) for above, denominator in ratios]
    unit = math.gcd(*whole)
    small = [one // unit for one in whole]
    return list(map(float, small)) if max(small) < EXACT_WEIGHT else weights


class Doubt:
    """What the float64 sums of a block may be off by; buffers of one thread, 28 bytes for each number."""

    def __init__(self, device: torch.device, elements: int) -> None:
        self._squares = torch.empty(elements, dtype=torch.float64, device=device)
        self._wide = torch.empty(elements, dtype=torch.float64, device=device)
        self._wider = torch.empty(elements, dtype=torch.float64, device=device)
        self._narrow = torch.empty(elements, dtype=torch.float32, device=device)

    def squares(self, count: int, updates: int, dtype: torch.dtype) -> Tensor:
        """What the squares of the updates' blocks are to be added to."""
        kept = self._squares if dtype == torch.float64 else self._squares.view(torch.float32)
        return kept[:count].fill_(least_squares(updates))

    def left_by(
        self, squares: Tensor, mean: Tensor, weights: Sequence[float], dtype: torch.dtype
    ) -> Tensor:
        """Indices, int64, of the means that may have to be rounded otherwise; `squares` is overwritten."""
        unit = unit_of(weights)
        count = mean.numel()
        wide, wider, low = self._wide[:count], self._wider[:count], self._narrow[:count]
        high = self._squares.view(torch.float32)[:count]
        if dtype != torch.float32:
            return undecided(mean, squares.sqrt_().mul_(unit), dtype)
        wide.copy_(squares.sqrt_())
        low.copy_(torch.sub(mean, wide, alpha=unit, out=wider))
        high.copy_(torch.add(mean, wide, alpha=unit, out=wide))
        return _apart(low, high, mean)


def least_squares(updates: int) -> float:
    """What the sum of squares begins with: as much as may have vanished from it."""
    return updates * (8 * UNDERFLOW) ** 2


def unit_of(weights: Sequence[float]) -> float:
    """What means are off by at most, in units of the root of the squares' sum.

    Each partial sum is rounded, by a unit of the sizes in it at most: so a term counts as often as it was added,
    once for its product, and twice for the division and for what is computed here. By Cauchy and Schwarz such weighted
    sizes add up to no more than the root of the factors' squares times that of the terms'. A tenth more, because
    squares are rounded, too, and may underflow.
    """
    n = len(weights)
    often = (weight * (n - index + 4) for index, weight in enumerate(weights))
    return 1.1 * UNIT * math.sqrt(math.fsum(one * one for one in often)) / math.fsum(weights)


def unit_where_sent(updates: int) -> float:
    """What means that have a divisor each are off by at most, in units of the sum of their terms' sizes by the divisor."""
    return 1.1 * UNIT * (2 * updates + 4)  # additions of terms, and of weights


def undecided(mean: Tensor, off: Tensor, dtype: torch.dtype) -> Tensor:
    """Indices, int64, of numbers that can be rounded to more than one if they are `off` by as much; not of NaN."""
    return _apart(_cast(mean - off, dtype), _cast(mean + off, dtype), mean)


def _apart(low: Tensor, high: Tensor, mean: Tensor) -> Tensor:
    if low.is_cuda:
        where = (low != high).nonzero().reshape(-1)
    else:  # a tenth of torch's time
        where = torch.from_numpy(np.flatnonzero(low.numpy() != high.numpy()))
    return where[torch.isfinite(mean[where])]


def _cast(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to `dtype`, in one that can be compared."""
    cast = narrowed(values, dtype).to(dtype)
    return cast if dtype.itemsize > 2 else cast.to(torch.float32)


def settled(
    columns: Tensor, weights: Sequence[float], dtype: torch.dtype, sent: Tensor | None = None
) -> Tensor:
    """The exact means of (updates, numbers) float64, as float64 that `narrowed` to `dtype` round correctly.

    `sent`, bool of that shape, says which of them count; the others must be zero. None: all.
    """
    found = torch.zeros(columns.shape[1], dtype=torch.float64)
    left = torch.arange(columns.shape[1])
    if columns.numel() > FEW:
        if dtype == torch.float64:
            found, sure = _in_two_parts(columns, weights, _divisor(weights, sent))
            left = left[~sure]
        elif exact_products(weights):
            found, sure = _without_error(columns, weights, _divisor(weights, sent))
            left = left[~sure]
        if left.numel() and dtype != torch.float64:
            divisor = _divisor(weights, None if sent is None else sent[:, left])
            found[left], sure = _with_error(columns[:, left], weights, divisor, dtype)
            left = left[~sure]
    for index in left.tolist():
        here = None if sent is None else sent[:, index].tolist()
        mean = _exactly(columns[:, index].tolist(), weights, here)
        found[index] = float(mean) if dtype == torch.float64 else _to_odd(mean)
    return found


def _exactly(
    values: Sequence[float], weights: Sequence[float], sent: Sequence[bool] | None
) -> Fraction:
    by = [Fraction(weight) for weight in weights]
    total = sum((w * Fraction(one) for w, one in zip(by, values, strict=True)), Fraction())
    return total / sum(by if sent is None else compress(by, sent))


def _divisor(weights: Sequence[float], sent: Tensor | None) -> Divisor:
    return sum_of(weights) if sent is None else sum_over(sent, weights)


def _in_two_parts(
    columns: Tensor, weights: Sequence[float], divisor: Divisor
) -> tuple[Tensor, Tensor]:
    """Means of float64, and which of them are right: because two float64 hold the sum of their terms without any error.

    That is so of most that lie in the middle of two numbers, unless they are huge or tiny.
    """
    high, low = torch.zeros((2, columns.shape[1]), dtype=torch.float64)
    sure = torch.ones(columns.shape[1], dtype=torch.bool)
    for row, weight in zip(columns, weights, strict=True):
        size = row.abs()
        sure &= (size == 0) | ((size > TINY) & (size < 1 / TINY))
        for term in two_product(row, weight):
            high, rounded = two_sum(high, term)
            low, lost = two_sum(low, rounded)
            sure &= lost == 0
    high, low = two_sum(high, low)
    by = divisor.value
    quotient = high / by
    rest, lost = two_sum(remainder_of(high, quotient, by), low)
    part = rest / by
    product, error = two_product(part, by)
    bound = torch.where((lost == 0) & (product == rest) & (error == 0), 0.0, part.abs() * 4 * UNIT)
    sure &= quotient + (part - bound) == quotient + (part + bound)
    sure &= (high == 0) | (quotient.abs() > TINY)
    sure &= torch.as_tensor(divisor.noise == 0)
    if not all(2.0**-60 < weight < 2.0**60 for weight in weights):  # products may lose bits
        sure[:] = False
    return quotient + part, sure | ~(columns != 0).any(0)


def _with_error(
    columns: Tensor, weights: Sequence[float], divisor: Divisor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Means, rounded to odd, and which of them are right: 106 bits of sums leave hardly one in doubt."""
    quotient, part, bound = mean_in_parts(columns, weights, divisor)
    low, high = (_cast(_sum_to_odd(quotient, part + off), dtype) for off in (-bound, bound))
    return _sum_to_odd(quotient, part), low == high


def _sum_to_odd(a: Tensor, b: Tensor) -> Tensor:
    return _odd(*two_sum(a, b))


def _odd(values: Tensor, rest: Tensor) -> Tensor:
    """Of the two neighbours of `values + rest` the one with an odd last bit; `values` where there is no rest."""
    beside = torch.nextafter(values, torch.copysign(torch.full_like(values, math.inf), rest))
    even = values.view(torch.int64) % 2 == 0
    return torch.where((rest != 0) & even, beside, values)


def _without_error(
    columns: Tensor, weights: Sequence[float], divisor: Divisor
) -> tuple[Tensor, Tensor]:
    """Means, rounded to odd, and which of them are right because no sum of their terms can have been rounded.

    That is so where all terms together stay below 2**53 units of the smallest one's last place, of 24.
    """
    by = torch.tensor(weights, dtype=torch.float64)
    sizes = columns.abs()
    sum_of_sizes = by @ sizes
    smallest = sizes.masked_fill_(sizes == 0, math.inf).amin(0)
    sure = sum_of_sizes < smallest * 2.0**29
    total = by @ columns
    mean = total / divisor.value
    return _odd(mean, remainder_of(total, mean, divisor.value)), sure


def _to_odd(value: Fraction) -> float:
    """Nothing that is rounded once more, to at most 51 bits, tells it from `value`."""
    near = float(value)
    if Fraction(near) == value or int(near.hex().split("p")[0][-1], 16) % 2:
        return near
    return math.nextafter(near, math.inf if Fraction(near) < value else -math.inf)
