"""Correct rounding of means: which float64 sums could round either way, and what the exact mean says of those.

A sum of float64 is off by at most a known part of its terms' sizes (Higham 2002, section 4.2). Where a number and what it
could be instead round to the same number of the narrower dtype, it is the right one. Of random numbers about one in
100,000 is not that sure, of those whose terms cancel more, and of a few updates that count alike each that lies exactly in the
middle of two numbers: the mean of two does so every third time. Most of these are sums without any error, which a look
at their terms shows; the rest takes sums of twice the precision, or of any.
"""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from fl_server_ai.aggregation.double import mean_in_parts, two_product
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


def settled(columns: Tensor, weights: Sequence[float], dtype: torch.dtype) -> Tensor:
    """The exact means of (updates, numbers) float64, as float64 that `narrowed` to `dtype` round correctly."""
    found = torch.zeros(columns.shape[1], dtype=torch.float64)
    left = torch.arange(columns.shape[1])
    if dtype != torch.float64 and columns.numel() > FEW:
        if exact_products(weights):
            found, sure = _without_error(columns, weights)
            left = left[~sure]
        if left.numel():
            found[left], sure = _with_error(columns[:, left], weights, dtype)
            left = left[~sure]
    by = [Fraction(weight) for weight in weights]
    divisor = sum(by)
    for index in left.tolist():
        values = map(Fraction, columns[:, index].tolist())
        mean = sum((w * value for w, value in zip(by, values, strict=True)), Fraction()) / divisor
        found[index] = float(mean) if dtype == torch.float64 else _to_odd(mean)
    return found


def _with_error(
    columns: Tensor, weights: Sequence[float], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Means, rounded to odd, and which of them are right: 106 bits of sums leave hardly one in doubt."""
    quotient, part, bound = mean_in_parts(columns, weights)
    low, high = (_cast(_sum_to_odd(quotient, part + off), dtype) for off in (-bound, bound))
    return _sum_to_odd(quotient, part), low == high


def _sum_to_odd(a: Tensor, b: Tensor) -> Tensor:
    total = a + b
    other = total - a
    return _odd(total, (a - (total - other)) + (b - other))


def _odd(values: Tensor, rest: Tensor) -> Tensor:
    """Of the two neighbours of `values + rest` the one with an odd last bit; `values` where there is no rest."""
    beside = torch.nextafter(values, torch.copysign(torch.full_like(values, math.inf), rest))
    even = values.view(torch.int64) % 2 == 0
    return torch.where((rest != 0) & even, beside, values)


def _without_error(columns: Tensor, weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Means, rounded to odd, and which of them are right because no sum of their terms can have been rounded.

    That is so where all terms together stay below 2**53 units of the smallest one's last place, of 24.
    """
    by = torch.tensor(weights, dtype=torch.float64)
    sizes = columns.abs()
    sum_of_sizes = by @ sizes
    smallest = sizes.masked_fill_(sizes == 0, math.inf).amin(0)
    sure = sum_of_sizes < smallest * 2.0**29
    total, divisor = by @ columns, math.fsum(weights)
    mean = total / divisor
    product, error = two_product(mean, divisor)
    return _odd(mean, (total - product) - error), sure  # exact, as a division's remainder always is


def _to_odd(value: Fraction) -> float:
    """Nothing that is rounded once more, to at most 51 bits, tells it from `value`."""
    near = float(value)
    if Fraction(near) == value or int(near.hex().split("p")[0][-1], 16) % 2:
        return near
    return math.nextafter(near, math.inf if Fraction(near) < value else -math.inf)
