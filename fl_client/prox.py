"""FedProx for training loops that handle NumPy arrays: the gradient of the proximal term."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fl_client.arrays import array_of, floats_of

if TYPE_CHECKING:
    import numpy as np


def proximal_gradient(
    weights: Mapping[str, Any], reference: Mapping[str, Any], mu: float
) -> dict[str, "np.ndarray[Any, Any]"]:
    """`mu * (w - reference)` for each floating array, in its dtype; add it to the loss's gradient.

    `reference` holds the weights that the round began with. Torch tensors will do too; of dtypes that NumPy lacks
    (bfloat16) the gradient is float32. Li et al. 2020, arXiv:1812.06127.
    """
    return {
        name: (mu * (numbers - array_of(reference[name]))).astype(array_of(value).dtype)
        for name, value in weights.items()
        if (numbers := floats_of(value)) is not None
    }
