"""Order statistics of every coordinate: what is needed of a sort, and only that where it is faster.

Of a few updates, a sorting network (Batcher's merge exchange, Knuth 5.2.2M) compares whole rows, so that each
comparison is one pass of vector instructions, and comparisons that do not lead to a wanted rank are left out.
Of more, each column is sorted, also with vector instructions; selecting is slower up to hundreds.
Numbers are compared as integers that sort as the floats do: bits, not values, so -0 < +0 and either way
makes the bytes of a full sort.
"""

import threading
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from fl_server_ai.aggregation.ranking import Comparison

NETWORK = 32  # updates; beyond, sorting is faster
COMPILED = 400  # the same where the network is compiled
_kept = threading.local()
INTEGERS = {1: "char", 2: "short", 4: "int", 8: "long"}


def ranked(rows: "Tensor", first: int, last: int) -> "Tensor":
    """(n, block) floats to (last - first, block): of each column the ranks from `first` to before `last`.

    In memory of this thread, valid until it asks for ranks again.
    """
    whole = getattr(rows[:0, :0], INTEGERS[rows.element_size()])().dtype
    if rows.is_cuda:
        there: Tensor = _turn(_turn(rows.view(whole)).sort(dim=0).values[first:last])
        return there.view(rows.dtype)
    # Not at the top: strategies are listed by processes that load neither torch nor NumPy.
    from fl_server_ai.aggregation.compiled import kernels
    from fl_server_ai.aggregation.ranking import as_array, by_network, by_sorting

    result = _room(rows, last - first)
    keys, target = rows.view(whole).numpy(), result.view(whole).numpy()
    loops = kernels()
    if loops is not None and len(rows) <= COMPILED:
        keys = keys if keys.flags.c_contiguous else keys.copy()
        loops.rank(keys, as_array(network(len(rows), first, last)), first, target)
    elif len(rows) <= NETWORK:
        floats = rows.element_size() in (4, 8)  # NumPy compares halves one by one
        by_network(keys, target, network(len(rows), first, last), first, floats)
    else:
        by_sorting(keys, target, first)
    return result


def _room(rows: "Tensor", count: int) -> "Tensor":
    """`count` lines like those of `rows`: making them anew for each block would leave holes in the heap."""
    nbytes = count * rows.shape[1] * rows.element_size()
    store: Tensor | None = getattr(_kept, "ranks", None)
    if store is None or len(store) < nbytes:
        store = _kept.ranks = rows.new_empty(nbytes, dtype=rows[:0].byte().dtype)
    found: Tensor = store[:nbytes].view(rows.dtype).view(count, -1)
    return found


def _turn(bits: "Tensor") -> "Tensor":
    """A float's bits to the integer that sorts like it, and back: negative numbers are turned over."""
    width = 8 * bits.element_size()
    turned: Tensor = bits ^ ((bits >> (width - 1)) & (2 ** (width - 1) - 1))
    return turned


@lru_cache(maxsize=32)
def network(count: int, first: int, last: int) -> "tuple[Comparison, ...]":
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
    total = _mean(values)
    if values.element_size() == 8 and not total.isfinite().all():
        # Each number loses nothing but bits far below the largest.
        total = total.where(total.isfinite(), _mean(values * 2.0**-16) * 2.0**16)
    return total


def _mean(values: "Tensor") -> "Tensor":
    """Added one row after the other."""
    if not values.is_cuda:
        from fl_server_ai.aggregation.compiled import kernels
        from fl_server_ai.aggregation.ranking import mean_over

        wide = values if values.element_size() >= 4 else values.float()
        mean: Tensor = values.new_empty(values.shape[1:], dtype=wide[:0].double().dtype)
        loops = kernels()
        (mean_over if loops is None else loops.mean_over)(wide.numpy(), mean.numpy())
        return mean
    total = values[0].double().clone()
    for row in values[1:]:
        total += row.double()
    return (total / len(values)).where(values[0] != values[-1], values[0].double())
