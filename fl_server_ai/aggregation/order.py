"""Order statistics of every coordinate: what is needed of a sort, and only that where it is faster.

Of a few updates, a sorting network (Batcher's merge exchange, Knuth 5.2.2M) compares whole rows, so that each
comparison is one pass of vector instructions, and comparisons that do not lead to a wanted rank are left out.
Of more, NumPy sorts the columns, also with vector instructions; its partition is slower up to hundreds.
Numbers are compared as integers that sort as the floats do: bits, not values, so -0 < +0 and either way
makes the bytes of a full sort.
"""

from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

NETWORK = 16  # updates; beyond, sorting is faster
COLUMNS = {True: 16_384, False: 4096}  # a pass of the network; of sorting
INTEGERS = {1: "char", 2: "short", 4: "int", 8: "long"}
Comparison = tuple[
    int, int, bool, bool
]  # two rows, and whether the smaller and the larger are needed


def ranked(rows: "Tensor", first: int, last: int) -> "Tensor":
    """(n, block) floats to (last - first, block): of each column the ranks from `first` to before `last`."""
    count, width = rows.shape
    whole = getattr(rows[:0, :0], INTEGERS[rows.element_size()])().dtype
    result: Tensor = rows.new_empty((last - first, width))
    target = result.view(whole)
    compare = count <= NETWORK and not rows.is_cuda
    for start in range(0, width, COLUMNS[compare]):
        part = slice(start, start + COLUMNS[compare])
        keys = _turn(rows[:, part].view(whole))
        if compare:
            _by_network(target[:, part], keys, first, last)
        elif rows.is_cuda:
            target[:, part] = _turn(keys.sort(dim=0).values[first:last])
        else:
            columns = keys.T.contiguous()
            columns.numpy().sort(axis=1)
            target[:, part] = _turn(columns[:, first:last]).T
    return result


def _by_network(target: "Tensor", keys: "Tensor", first: int, last: int) -> None:
    lines = list(keys.unbind(0))
    for a, b, smaller, larger in network(len(keys), first, last):
        x, y = lines[a], lines[b]
        if smaller:
            lines[a] = x.minimum(y)
        if larger:
            lines[b] = x.maximum(y)
    for line, key in zip(target, lines[first:last], strict=True):
        line.copy_(_turn(key))


def _turn(bits: "Tensor") -> "Tensor":
    """A float's bits to the integer that sorts like it, and back: negative numbers are turned over."""
    width = 8 * bits.element_size()
    turned: Tensor = bits ^ ((bits >> (width - 1)) & (2 ** (width - 1) - 1))
    return turned


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


def mean_of(values: "Tensor") -> "Tensor":
    """(k, block), sorted in each column, to the mean over k: (block,) float64; no finite numbers overflow.

    Where all are alike, that value, bit for bit.
    """
    k = len(values)
    total = _sum(values, 1.0) / k
    if (
        not total.isfinite().all()
    ):  # float64 only; each number loses nothing but bits far below the largest
        total = total.where(total.isfinite(), _sum(values, 2.0**-16) / k * 2.0**16)
    return total.where(values[0] != values[-1], values[0].double())


def _sum(values: "Tensor", scale: float) -> "Tensor":
    total = values[0].double() * scale
    for row in values[1:]:
        total += row.double() * scale
    return total
