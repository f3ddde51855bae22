"""The clients' first and second moments of their weights, checked and combined, tensor by tensor."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fl_server_core.exceptions import Invalid, KeyMismatch, NonFinite, ShapeMismatch, Unusable

Variance = Literal["total", "within", "between"]
# How far second - mean^2 may be below 0, relative to mean^2: what averaging in this dtype can do.
ROUNDING = {
    torch.float64: 1e-12,
    torch.float32: 3e-5,
    torch.float16: 8e-3,
    torch.bfloat16: 6e-2,
}


@dataclass(frozen=True)
class Moments:
    """One client's running means of w and of w^2, by tensor name; the mappings may read lazily.

    `second` decides which tensors are meant: floats of the same shape as in `mean`. What only `mean` has
    (buffers) is left alone.
    """

    num_examples: float
    mean: Mapping[str, Tensor]
    second: Mapping[str, Tensor]


def check_moments(mean: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    """Refuse moments that no weights can have; the first bad tensor is named.

    Raises KEY_MISMATCH, SHAPE_MISMATCH, NON_FINITE, or MOMENTS_INCONSISTENT with the flat index of the first
    number whose second moment is below the square of its mean by more than rounding.
    """
    if not second:
        raise KeyMismatch("there are no second moments")
    for name in second:
        if name not in mean:
            raise KeyMismatch(f"{name} has a second moment and no mean", tensor=name)
        check_pair(name, mean[name], second[name])


def check_pair(name: str, mean: Tensor, second: Tensor) -> None:
    """`check_moments` for one tensor."""
    if mean.shape != second.shape:
        raise ShapeMismatch(
            f"{name}: mean {tuple(mean.shape)}, second moment {tuple(second.shape)}", tensor=name
        )
    for tensor in (mean, second):
        if tensor.dtype not in ROUNDING:
            raise Unusable(f"{name}: moments are floats", code="MOMENTS_INCONSISTENT", tensor=name)
        if not tensor.isfinite().all():
            raise NonFinite(f"{name}: a moment is NaN or infinite", tensor=name)
    square = mean.double().square()
    slack = square * max(ROUNDING[mean.dtype], ROUNDING[second.dtype])
    slack += max(torch.finfo(mean.dtype).tiny, torch.finfo(second.dtype).tiny)
    bad = square - second.double() > slack  # so is any second moment below 0
    if bad.any():
        index = int(bad.flatten().nonzero()[0, 0])
        raise Unusable(
            f"{name}[{index}]: second moment {second.flatten()[index].item():g} is below the square of "
            f"the mean {mean.flatten()[index].item():g}; send the running means of w and w*w over the "
            "same steps",
            code="MOMENTS_INCONSISTENT",
            tensor=name,
            index=index,
        )


def combine_moments(
    clients: Sequence[Moments], variance: Variance = "total"
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Moments of the clients' mixture, weighted by examples: name, mean, second; float64 each.

    `second - mean^2` is the chosen variance, so samplers need not know which it is:
    `within` sum w_i (second_i - mean_i^2), what training moved; `between` sum w_i (mean_i - mean)^2, where
    clients disagree; `total` both. Store `second` as float64: float32 can lose a small variance.

    Holds a few tensors at a time. The order of the clients changes the result by rounding only.
    Raises what `check_moments` raises, for the first bad client, whose place is the refusal's `client`.
    """
    if not clients:
        raise Invalid("there are no moments to combine", code="NO_MOMENTS")
    for place, client in enumerate(clients):
        if not 0 < client.num_examples < float("inf"):
            raise Invalid("moments need a sample size", code="SAMPLE_SIZE", client=place)
        if client.second.keys() != clients[0].second.keys():
            odd = sorted(client.second.keys() ^ clients[0].second.keys())
            raise KeyMismatch(
                f"moments differ in their tensors: {odd[0]}", client=place, tensor=odd[0]
            )
    for name in clients[0].second:
        yield name, *_combine(name, clients, variance)


def _combine(name: str, clients: Sequence[Moments], variance: Variance) -> tuple[Tensor, Tensor]:
    total = 0.0
    mean = within = between = torch.zeros(())
    for place, client in enumerate(clients):
        if name not in client.mean:
            raise KeyMismatch(f"{name} has a second moment and no mean", client=place, tensor=name)
        first, second = client.mean[name], client.second[name]
        try:
            check_pair(name, first, second)
        except Unusable as refusal:
            refusal.data["client"] = place
            raise
        if place and first.shape != mean.shape:
            raise ShapeMismatch(f"{name}: clients differ in shape", client=place, tensor=name)
        first = first.double()
        if not place:
            mean, within, between = (torch.zeros_like(first) for _ in range(3))
        total += client.num_examples
        share = client.num_examples / total
        inner = (second.double() - first.square()).clamp(min=0.0)
        delta = first - mean
        mean += delta * share
        within += (inner - within) * share
        between += (delta * (first - mean) - between) * share
    spread = {"total": within + between, "within": within, "between": between}[variance]
    return mean, mean.square() + spread
