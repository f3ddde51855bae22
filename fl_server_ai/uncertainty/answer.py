"""What a caller gets: the inference and its uncertainty, never with a NaN or an infinity."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fl_server_core.exceptions import Unusable


@dataclass(frozen=True)
class Answer:
    """Tensors whose first dimension is the batch. Statistics are float64; indices are int64."""

    inference: Tensor
    uncertainty: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        for name, tensor in self.tensors().items():
            refuse_non_finite(tensor, f"its {name}")

    def tensors(self) -> dict[str, Tensor]:
        """By flat names, for binary answers: `inference`, `uncertainty.variance` and so on."""
        named = {f"uncertainty.{name}": tensor for name, tensor in self.uncertainty.items()}
        return {"inference": self.inference} | named

    def to_json(self) -> dict[str, Any]:
        """Nested lists of numbers, one list a sample."""
        return {
            "inference": self.inference.tolist(),
            "uncertainty": {name: tensor.tolist() for name, tensor in self.uncertainty.items()},
        }


def first_sample(bad: Tensor) -> int | None:
    """Index of the first sample for which any element of `bad` (bool, batch first) is true."""
    hits = bad.reshape(bad.shape[0], -1).any(dim=1) if bad.numel() else bad.new_zeros(0)
    return int(hits.nonzero()[0, 0]) if hits.any() else None


def refuse_non_finite(tensor: Tensor, what: str, *, masked: bool = False) -> None:
    """Raise NON_FINITE_OUTPUT, naming the sample. With `masked`, -inf is a class that cannot be."""
    bad = ~tensor.isfinite()
    if masked:
        bad &= ~tensor.isneginf()
    sample = first_sample(bad)
    if sample is not None:
        raise Unusable(
            f"sample {sample}: {what} holds NaN or infinity; look at that sample's input and at the "
            "model's weights",
            code="NON_FINITE_OUTPUT",
            sample=sample,
        )
