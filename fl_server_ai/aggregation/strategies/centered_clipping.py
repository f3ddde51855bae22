"""Clipping around a centre that moves: Karimireddy, He, Jaggi 2021, https://arxiv.org/abs/2012.10333."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fl_server_ai.aggregation import STRATEGIES, Strategy, UpdateMeta
from fl_server_ai.aggregation.geometry import compared, distances_from, median, move, shorten

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class CenteredClippingOptions:
    """How far from the centre an update counts, and how often the centre moves."""

    tau: float | None = field(
        default=None,
        metadata={
            "gt": 0.0,
            "doc": "The longest way from the centre, in the L2 norm over all float tensors; null: "
            "the median of the distances, anew in each step.",
        },
    )
    iters: int = field(
        default=3, metadata={"ge": 1, "le": 1000, "doc": "Steps of the centre; each is cheap."}
    )


@STRATEGIES.register("CenteredClipping")
class CenteredClipping(Strategy[CenteredClippingOptions]):
    """v = v + mean of (D_k - v) min(1, tau / |D_k - v|), some times, from where v was last; x' = x + v.

    D_k = y_k - x; v is the way that the model went in the round before, at first 0. So an attack has to keep up for
    rounds, and honest updates that go on in one direction are hardly clipped. Sample sizes do not count. Integer
    buffers are averaged with the shares that the updates have in v; running statistics move without the old v.
    """

    Options = CenteredClippingOptions
    paper = "2012.10333"
    needs_gram = True
    state_blocks = ("v",)
    gram_block = "v"
    share = 1.0
    kept = 0.0  # of the old v

    def weights(self, metas: Sequence[UpdateMeta], gram: "Tensor | None") -> Sequence[float]:
        n = len(metas)
        shares = [0.0] * n + [1.0]  # the last is the old v's
        for _ in range(self.options.iters):
            away = distances_from(compared(gram), shares)[:n]
            limit = median(away) if self.options.tau is None else self.options.tau
            parts = [shorten(distance, limit) for distance in away]
            rest = 1 - sum(parts) / n
            shares = [
                share * rest + part / n for share, part in zip(shares, [*parts, 0.0], strict=True)
            ]
        self.share, self.kept = sum(shares[:n]), shares[n]
        return shares[:n]

    def update(self, x: "Tensor", y: "Tensor", state: "dict[str, Tensor]") -> "Tensor":
        moved = move(x, y, self.share) - (0 - state["v"] * self.kept)  # -0 stays -0
        state["v"] = moved - x
        return moved

    def statistics(self, x: "Tensor", y: "Tensor") -> "Tensor":
        return move(x, y, self.share)  # without v, which goes beyond
