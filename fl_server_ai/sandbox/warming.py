"""torch, made ready while files can still be opened: whatever it loads late is loaded before the doors close."""

import io
import warnings
from typing import Any

import torch
from torch import nn

from fl_server_ai.sandbox import (  # not later, when files are out of reach
    describing,  # noqa: F401
    drawing,  # noqa: F401
    images,
    preparing,  # noqa: F401
)


class _Tiny(nn.Module):
    """Convolution, normalisation, dropout, matrix product: each wakes another library."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(32, 2)
        )  # fmt: skip

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.layers(inputs)  # type: ignore[no-any-return]


def prepare(kind: str, device: str) -> bytes:
    """Import and start what needs files or devices, on one thread; a small TorchScript archive for `warm_up`."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    saved = io.BytesIO()
    image = torch.zeros(1, 1, 6, 6)
    if kind == "exported":
        from fl_server_ai.sandbox import exported_loading  # sympy and all that

        shapes = {"inputs": {0: torch.export.Dim.DYNAMIC}}  # which need sympy's late imports
        program = torch.export.export(
            _Tiny().eval(), (image.expand(2, -1, -1, -1),), dynamic_shapes=shapes, strict=False
        )
        torch.export.save(program, saved)
        saved.seek(0)
        exported_loading.load_exported(saved, "cpu").dropout(on=True)
        _load_script(_script(image), "cpu")  # preprocessing may be one
    else:
        saved.write(_script(image))
        _load_script(saved.getvalue(), "cpu")
    images.warm_up()
    _compute(_Tiny(), "cpu")
    if device != "cpu":
        _compute(_Tiny().to(device), device)
    return saved.getvalue()


def warm_up(kind: str, device: str, memory: int, threads: int, saved: bytes) -> None:
    """Start the threads, after the file system is gone, so that they are restricted like the rest."""
    torch.set_num_threads(threads)
    if device != "cpu":
        total = torch.cuda.mem_get_info(device)[1]
        torch.cuda.memory.set_per_process_memory_fraction(min(memory / total, 1.0), device)
    if kind == "torchscript":
        _compute(_load_script(saved, device), device)
    _compute(_Tiny().to(device), device)


def _script(image: torch.Tensor) -> bytes:
    saved = io.BytesIO()
    trace: Any = torch.jit.trace
    torch.jit.save(trace(_Tiny().eval(), image, check_trace=False), saved)
    return saved.getvalue()


def _load_script(saved: bytes, device: str) -> Any:
    return torch.jit.load(io.BytesIO(saved), map_location=device)  # type: ignore[no-untyped-call]


def _compute(module: Any, device: str) -> None:
    with torch.inference_mode():
        for count in (1, 64, 1):
            module(torch.zeros(count, 1, 6, 6, device=device))
        torch.linalg.svd(torch.eye(64, device=device) @ torch.eye(64, device=device))
        torch.zeros(2**18, device=device).exp()
