"""Random modules and the files that torch writes of them, as the tests of torch archives need them."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
    torch.int8, torch.uint8, torch.bool, torch.complex64,
]  # fmt: skip
UNTYPED = [torch.uint16, torch.uint32, torch.uint64, torch.float8_e5m2, torch.float8_e4m3fn]


class Block(nn.Module):
    """Holds whatever tensors a test gives it, under names that say what they are."""

    def __init__(self) -> None:
        super().__init__()
        self.settings = {"rate": 0.5, "names": ["a", "b"], "shape": (1, 2)}
        self.activation = nn.functional.relu
        self.kind = torch.float32

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs


@st.composite
def tensors(draw: st.DrawFn, dtypes: list[torch.dtype] | None = None) -> Tensor:
    """Any dtype, zero to four dimensions, sometimes a view with strides and an offset."""
    dtype = draw(st.sampled_from(dtypes or DTYPES))
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    seed = draw(st.integers(0, 2**32 - 1))
    bits = torch.randint(0, 2, (*shape, dtype.itemsize), generator=torch.manual_seed(seed))
    tensor = bits.to(torch.uint8).view(dtype).reshape(shape) if dtype != torch.bool else None
    if tensor is None:
        tensor = bits.reshape(shape).bool()
    match draw(st.sampled_from(["plain", "transposed", "sliced", "stepped"])):
        case "transposed" if tensor.dim() > 1:
            return tensor.transpose(0, -1)
        case "sliced" if tensor.dim() and tensor.shape[0] > 1:
            return tensor[1:]
        case "stepped" if tensor.dim() and tensor.shape[-1] > 1:
            return tensor[..., ::2]
    return tensor


@st.composite
def state_dicts(draw: st.DrawFn) -> dict[str, Tensor]:
    """Named tensors, some of them tied."""
    names = st.text("abcXYZ_.0189äß", min_size=1, max_size=12)
    found = draw(st.dictionaries(names, tensors([*DTYPES, *UNTYPED]), min_size=1, max_size=6))
    if draw(st.booleans()):
        found["tied"] = next(iter(found.values()))
    return found


@st.composite
def modules(draw: st.DrawFn, depth: int = 2) -> nn.Module:
    """Nested modules with parameters, buffers of both sorts, ties, None, and layers of torch's own."""
    module = Block()
    floats = [dtype for dtype in DTYPES if dtype.is_floating_point]
    for index in range(draw(st.integers(0, 2))):
        module.register_parameter(f"p{index}", nn.Parameter(draw(tensors(floats))))
        module.register_buffer(f"b{index}", draw(tensors()), persistent=draw(st.booleans()))
    if draw(st.booleans()):
        module.register_parameter("absent", None)
        module.register_buffer("missing", None)
    if draw(st.booleans()) and len(module._parameters):
        name, parameter = next(iter(module._parameters.items()))
        if parameter is not None:
            module.register_parameter(f"{name}_tied", parameter)
    if draw(st.booleans()):
        module.add_module("layer", draw(st.sampled_from(LAYERS))())
    if depth:
        for index in range(draw(st.integers(0, 2))):
            module.add_module(f"m{index}", draw(modules(depth - 1)))
    return module


def _tied() -> nn.Module:
    shared = nn.Linear(3, 3)
    return nn.Sequential(shared, nn.ReLU(), shared, nn.Sequential(nn.Linear(3, 2), shared))


LAYERS: list[Callable[[], nn.Module]] = [
    lambda: nn.Linear(3, 2),
    lambda: nn.Linear(3, 2, bias=False, dtype=torch.float64),
    lambda: nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last),
    lambda: nn.BatchNorm1d(3),
    lambda: nn.BatchNorm1d(3, track_running_stats=False),
    lambda: nn.LSTM(2, 3, num_layers=2, bidirectional=True),
    lambda: nn.GRU(2, 3),
    lambda: nn.Embedding(4, 3, padding_idx=0),
    lambda: nn.MultiheadAttention(4, 2),
    lambda: nn.TransformerEncoderLayer(4, 2, 8),
    lambda: nn.LayerNorm(4),
    lambda: nn.Dropout(0.5),
    lambda: nn.utils.spectral_norm(nn.Linear(3, 2)),
    lambda: nn.ParameterList([nn.Parameter(torch.ones(2)), nn.Parameter(torch.zeros(1))]),
    _tied,
]


def scripted(module: nn.Module, path: Path) -> None:
    """Script it and save the archive."""
    with warnings.catch_warnings(action="ignore"):
        torch.jit.script(module).save(str(path))


def packed(tensor: Tensor) -> Tensor:
    """Its bytes in C order; torch calls some strided tensors contiguous that it can't view as bytes."""
    whole = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
    return (
        whole.flatten().view(torch.uint8)
        if whole.numel()
        else whole.new_empty(0, dtype=torch.uint8)
    )


def bits(tensor: Tensor) -> tuple[Any, ...]:
    """What two tensors must share to be equal bit for bit, NaN or not."""
    return tensor.dtype, tuple(tensor.shape), bytes(packed(tensor).tolist())
