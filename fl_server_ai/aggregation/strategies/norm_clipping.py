"""The mean of updates that are shortened to a common limit: Sun et al. 2019, https://arxiv.org/abs/1911.07963."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fl_server_ai.aggregation import (
    STRATEGIES,
    Strategy,
    UpdateMeta,
    sample_weights,
    weighting_field,
)
from fl_server_ai.aggregation.geometry import compared, median, move, norms, shorten

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class NormClippingOptions:
    """How far an update may go."""

    C: float | None = field(
        default=None,
        metadata={
            "gt": 0.0,
            "doc": "The longest way from the global model, in the L2 norm over all float tensors; "
            "null: the median of the round's.",
        },
    )
    weighting: str = weighting_field("uniform")


@STRATEGIES.register("NormClipping")
class NormClipping(Strategy[NormClippingOptions]):
    """x' = x + mean of D_k min(1, C / |D_k|), D_k = y_k - x; an update that did not move stays as it is.

    Limits what one participant can do to C / n; many that agree still move the model.
    Integer buffers are averaged with the weights p_k min(1, C / |D_k|).
    """

    Options = NormClippingOptions
    paper = "1911.07963"
    needs_gram = True
    share = 1.0

    def weights(self, metas: Sequence[UpdateMeta], gram: "Tensor | None") -> Sequence[float]:
        sizes = sample_weights(metas, self.options.weighting)
        lengths = norms(compared(gram))
        limit = median(lengths) if self.options.C is None else self.options.C
        kept = [shorten(length, limit) for length in lengths]
        weights = [size * part for size, part in zip(sizes, kept, strict=True)]
        self.share = sum(weights) / sum(sizes)
        return weights

    def update(self, x: "Tensor", y: "Tensor", state: "dict[str, Tensor]") -> "Tensor":
        return move(x, y, self.share)

    def statistics(self, x: "Tensor", y: "Tensor") -> "Tensor":
        return move(x, y, self.share)
