"""Weights drawn around their mean: Maddox et al. 2019, https://arxiv.org/abs/1902.02476."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fl_server_ai.uncertainty.seeds import stream_key
from fl_server_core.exceptions import Invalid, KeyMismatch, ShapeMismatch

BLOCK = 1 << 20  # numbers; bounds the float64 copies, never changes a draw


def draw_weights(
    mean: Mapping[str, Tensor],
    second: Mapping[str, Tensor],
    *,
    seed: int,
    draw: int,
    scale: float = 1.0,
    eps: float = 1e-12,
    deviations: Mapping[str, Sequence[Tensor] | Tensor] | None = None,
    keep: Collection[str] = (),
    block: int = BLOCK,
) -> Iterator[tuple[str, Tensor]]:
    """Draw number `draw` of N(mean, scale * diag(max(second - mean^2, eps))), tensor by tensor.

    With `deviations` (K >= 2 of them, each w - mean, stacked along the first dimension) the covariance is
    scale * (diag / 2 + D D^T / (2 (K - 1))), as in the paper. Without, the draw is SWAG-diagonal.

    Yields every tensor of `mean`, in its shape, dtype and device. Integers, bools, those named in `keep` and
    those without a second moment (BatchNorm's statistics) come as they are. The same arguments give the same
    bits; each draw and each tensor has a stream of its own, so draws may be made alone and in any order.
    The mappings may read lazily: one tensor is held at a time.
    """
    unknown = [name for name in second if name not in mean]
    if unknown:
        raise KeyMismatch(f"{unknown[0]} has a second moment and no mean", tensor=unknown[0])
    if not (math.isfinite(scale) and scale >= 0 and math.isfinite(eps) and eps >= 0):
        raise Invalid(
            f"scale {scale} and eps {eps} must be finite and not negative", code="BAD_OPTION"
        )
    for name in mean:
        tensor = mean[name]
        if name not in second or name in keep or not tensor.is_floating_point():
            yield name, tensor
            continue
        if tensor.shape != second[name].shape:
            raise ShapeMismatch(f"{name}: the moments differ in shape", tensor=name)
        columns = None if deviations is None else deviations[name]
        if columns is not None:
            columns = _checked(name, columns, tensor)
        yield name, _draw_tensor(name, tensor, second[name], columns, seed, draw, scale, eps, block)


def write_weights(target: Mapping[str, Tensor], drawn: Iterator[tuple[str, Tensor]]) -> None:
    """Copy a draw into a model's own tensors in place; the names must be the same on both sides."""
    written = set()
    with torch.no_grad():
        for name, tensor in drawn:
            if name not in target:
                raise KeyMismatch(f"the model has no tensor {name}", tensor=name)
            if target[name].shape != tensor.shape:
                raise ShapeMismatch(f"{name}: the model's has another shape", tensor=name)
            target[name].copy_(tensor)
            written.add(name)
    left = [name for name in target if name not in written]
    if left:
        raise KeyMismatch(f"nothing was drawn for {left[0]}", tensor=left[0])


def clamped_fraction(
    mean: Mapping[str, Tensor], second: Mapping[str, Tensor], eps: float = 1e-12
) -> float:
    """Share of the weights whose variance is raised to `eps`; much of it means a SWAG that hardly moves."""
    total = clamped = 0
    for name in second:
        variance = second[name].double() - mean[name].double().square()
        clamped += int((variance < eps).sum())
        total += variance.numel()
    return clamped / total if total else 0.0


def _checked(
    name: str, columns: Sequence[Tensor] | Tensor, tensor: Tensor
) -> Sequence[Tensor] | Tensor:
    if len(columns) < 2:
        raise Invalid(f"{name}: a low-rank part needs at least 2 deviations", code="DEVIATIONS")
    if any(column.shape != tensor.shape for column in columns):
        raise ShapeMismatch(f"{name}: a deviation has another shape", tensor=name)
    return columns


def _normals(seed: int, draw: int, stream: str) -> np.random.Generator:
    """Numbers come out one after the other, so taking them in blocks changes none of them."""
    return np.random.Generator(np.random.Philox(key=stream_key(seed, draw, stream)))


def _draw_tensor(
    name: str,
    mean: Tensor,
    second: Tensor,
    columns: Sequence[Tensor] | Tensor | None,
    seed: int,
    draw: int,
    scale: float,
    eps: float,
    block: int,
) -> Tensor:
    normals = _normals(seed, draw, f"weights/{name}")
    flat, squares = mean.reshape(-1), second.reshape(-1)
    result = torch.empty_like(flat)
    factors: list[float] = []
    diagonal = scale
    if columns is not None:
        diagonal = scale / 2
        shared = _normals(seed, draw, "deviations").standard_normal(
            len(columns)
        )  # in all tensors alike
        factors = [float(z) * math.sqrt(scale / (2 * (len(columns) - 1))) for z in shared]
    for start in range(0, flat.numel(), block):
        part = slice(start, start + block)
        centre = flat[part].double()
        std = (squares[part].double() - centre.square()).clamp(min=eps).mul_(diagonal).sqrt_()
        noise = torch.from_numpy(normals.standard_normal(centre.numel())).to(centre.device)
        # Products and sums apart, one rounding each: fused ones would depend on the block's length.
        drawn = centre + std * noise
        for column, factor in zip(columns if columns is not None else (), factors, strict=True):
            drawn = drawn + column.reshape(-1)[part].double() * factor
        result[part] = drawn.to(mean.dtype)
    return result.reshape(mean.shape)
