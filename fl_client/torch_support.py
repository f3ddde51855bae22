"""Between torch modules and weights as the server knows them; torch is imported when used."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch


def get_weights(module: "torch.nn.Module") -> dict[str, Any]:
    """Parameters and buffers as arrays that share no memory with the module.

    Tensors whose dtype NumPy lacks (bfloat16) stay tensors, on the CPU.
    """
    weights: dict[str, Any] = {}
    for name, tensor in module.state_dict().items():
        copy = tensor.detach().to("cpu", copy=True)
        try:
            weights[name] = copy.numpy()
        except TypeError:
            weights[name] = copy
    return weights


def load_weights(module: "torch.nn.Module", weights: Mapping[str, Any]) -> None:
    """Copy weights into the module, which keeps its device; RuntimeError if names or shapes differ."""
    import torch

    module.load_state_dict({name: torch.as_tensor(value) for name, value in weights.items()})


def proximal_term(
    module: "torch.nn.Module", reference: Mapping[str, Any], mu: float
) -> "torch.Tensor":
    """FedProx's `mu / 2 * ||w - reference||^2` over the module's parameters, to add to the loss.

    `reference` holds the weights that the round began with. Li et al. 2020, arXiv:1812.06127.
    """
    import torch

    total = torch.zeros((), dtype=torch.float32)
    for name, parameter in module.named_parameters():
        start = torch.as_tensor(reference[name]).to(parameter)
        total = total.to(parameter.device) + (parameter - start).float().square().sum()
    return 0.5 * mu * total


def add_to_gradients(module: "torch.nn.Module", correction: Mapping[str, Any]) -> None:
    """Add arrays, by parameter name, to the gradients, such as SCAFFOLD's; call it before each step."""
    import torch

    for name, parameter in module.named_parameters():
        if parameter.grad is not None and name in correction:
            parameter.grad += torch.as_tensor(correction[name]).to(parameter.grad)


def raw_bytes(tensor: "torch.Tensor") -> "np.ndarray[Any, np.dtype[np.uint8]]":
    """The tensor's elements in C order, little endian, as uint8 of shape (bytes,)."""
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    array: np.ndarray[Any, np.dtype[np.uint8]] = flat.view(torch.uint8).numpy()
    return array


def from_raw_bytes(
    raw: "np.ndarray[Any, np.dtype[np.uint8]]", dtype: str, shape: list[int]
) -> "torch.Tensor":
    """The opposite of `raw_bytes`; shares memory with `raw`. `dtype` is a name such as bfloat16."""
    import torch

    return torch.from_numpy(raw).view(getattr(torch, dtype)).reshape(shape)
