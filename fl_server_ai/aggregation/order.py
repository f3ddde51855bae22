"""Order statistics of every coordinate: what is needed of a sort, and only that.

A sorting network (Batcher's merge exchange, Knuth 5.2.2M) compares whole rows, so that each comparison is one
pass of vector instructions; comparisons that do not lead to a wanted rank are left out. Numbers are compared
as integers that sort as the floats do: bits, not values, so -0 < +0 and the bytes are those of a full sort.
"""

from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

COLUMNS = 16_384  # a pass; fewer wait for Python, more for memory
LARGEST_NETWORK = 2048  # updates; beyond, the network has so many comparisons that sorting is faster
INTEGERS = {1: "char", 2: "short", 4: "int", 8: "long"}
Comparison = tuple[int, int, bool, bool]  # two rows, and whether the smaller and the larger are needed


def ranked(rows: "Tensor", first: int, last: int) -> "Tensor":
    """(n, block) floats to (last - first, block): of each column the ranks from `first` to before `last`."""
    count, width = rows.shape
    whole = getattr(rows[:0, :0], INTEGERS[rows.element_size()])().dtype
    result = rows.new_empty((last - first, width))
    target = result.view(whole)
    plain = rows.is_cuda or count > LARGEST_NETWORK
    step = width if plain else COLUMNS
    for start in range(0, width, max(1, step)):
        keys = _turn(rows[:, start : start + step].view(whole))
        place = target[:, start : start + step]
        if plain:
            place.copy_(_turn(keys.sort(dim=0).values[first:last]))
            continue
        lines = list(keys.unbind(0))
        for a, b, smaller, larger in network(count, first, last):
            x, y = lines[a], lines[b]
            if smaller:
                lines[a] = x.minimum(y)
            if larger:
                lines[b] = x.maximum(y)
        for line, key in zip(place, lines[first:last], strict=True):
            line.copy_(_turn(key))
    return result


def _turn(bits: "Tensor") -> "Tensor":
    """A float's bits to the integer that sorts like it, and back: negative numbers are turned over."""
    width = 8 * bits.element_size()
    return bits ^ ((bits >> (width - 1)) & (2 ** (width - 1) - 1))


@lru_cache(maxsize=32)
def network(count: int, first: int, last: int) -> tuple[Comparison, ...]:
    """Comparisons that bring the wanted ranks of `count` rows to their places."""
    needed = set(range(first, last))
    kept: list[Comparison] = []
    for a, b in reversed(_merge_exchange(count)):
        if a in needed or b in needed:
            kept.append((a, b, a in needed, b in needed))
            needed |= {a, b}
    return tuple(reversed(kept))


def _merge_exchange(count: int) -> list[tuple[int, int]]:
    pairs = []
    top = 1 << max(0, (count - 1).bit_length() - 1)
    p = top
    while p > 0:
        q, r, d = top, 0, p
        while True:
            pairs += [(i, i + d) for i in range(count - d) if i & p == r]
            if q == p:
                break
            d, q, r = q - p, q >> 1, p
        p >>= 1
    return pairs


def mean_of_ranks(rows: "Tensor", first: int, last: int) -> "Tensor":
    """(n, block) to (block,) float64: the mean of the ranks from `first` to before `last`, added in order."""
    return mean_of(ranked(rows, first, last))


def mean_of(values: "Tensor") -> "Tensor":
    """(k, block) to its mean over k, float64; a sum that overflows is taken again of the halves' halves."""
    k = len(values)
    total = _sum(values, 1.0) / k
    if not total.isfinite().all():
        # Only float64 can get here. Each number loses at most bits a thousand below the largest.
        total = total.where(total.isfinite(), _sum(values, 2.0**-16) / k * 2.0**16)
    return total


def _sum(values: "Tensor", scale: float) -> "Tensor":
    total = values[0].double() * scale
    for row in values[1:]:
        total += row.double() * scale
    return total
