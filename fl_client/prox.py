"""FedProx for training loops that handle NumPy arrays: the gradient of the proximal term."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


def proximal_gradient(
    weights: Mapping[str, "np.ndarray[Any, Any]"],
    reference: Mapping[str, "np.ndarray[Any, Any]"],
    mu: float,
) -> dict[str, "np.ndarray[Any, Any]"]:
    """`mu * (w - reference)` for each floating array, in its dtype; add it to the loss's gradient.

    `reference` holds the weights that the round began with. Li et al. 2020, arXiv:1812.06127.
    """
    return {
        name: (mu * (value - reference[name])).astype(value.dtype)
        for name, value in weights.items()
        if value.dtype.kind == "f"
    }
