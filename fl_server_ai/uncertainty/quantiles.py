"""Quantiles of weighted draws: Akinshin 2023, https://arxiv.org/abs/2304.07265, with Kish's sample size.

For equal weights this is NumPy's default, linear between the draws.
"""

from collections.abc import Sequence

from torch import Tensor


def weighted_quantiles(draws: Tensor, weights: Tensor, levels: Sequence[float]) -> list[Tensor]:
    """One tensor (batch, ...) for each level, float64; `draws` is (T, batch, ...), `weights` (T,) > 0.

    A quantile is the mean of the sorted draws over a window of the weight, one effective draw wide. The
    order of the draws does not matter.
    """
    values, order = draws.double().sort(dim=0)
    shares = weights.double() / weights.double().sum()
    effective = 1 / float(shares.square().sum())
    upper = shares[order].cumsum(dim=0)
    lower = upper - shares[order]
    origin = values[0]
    results = []
    for level in levels:
        start = level * (effective - 1) / effective
        parts = ((upper - start) * effective).clamp(0, 1) - ((lower - start) * effective).clamp(
            0, 1
        )
        results.append(origin + (parts * (values - origin)).sum(dim=0))
    return results
