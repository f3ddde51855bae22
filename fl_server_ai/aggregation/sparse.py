"""Means in which each number has its own denominator: for updates that leave single numbers out."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fl_server_ai.aggregation.blocks import FLOATS, Run, Source
from fl_server_ai.aggregation.double import Divisor, mean_of_float64, sum_over
from fl_server_ai.aggregation.exact import undecided, unit_where_sent
from fl_server_ai.aggregation.fold import Folder
from fl_server_ai.aggregation.masks import Masks

LEAST = 2.0**-1000  # far more than what vanishes from products that underflow


@dataclass(frozen=True)
class SparseBlock:
    """`count` numbers from `start` of a run, the `index`-th of floats, in the updates that count and in the base.

    Means are sum w m x / sum w m over the updates, (count,) float64, with the base's numbers where nobody sent one;
    beside them, where anybody did.
    """

    masks: Masks
    folder: Folder
    sources: Sequence[Source]
    weights: Sequence[float]
    base: Source
    run: Run
    index: int
    start: int
    count: int

    def mean(self) -> tuple[Tensor, Tensor]:
        """Plain float64 sums in the order of the updates, for float64 too.

        Where all that was sent is alike, that number, bit for bit.
        """
        device = self.folder.device
        nothing = torch.full((self.count,), -0.0, dtype=torch.float64, device=device)
        total, first = nothing.clone(), nothing.clone()  # -0 + x is x, -0 included
        divisor = torch.zeros(self.count, dtype=torch.float64, device=device)
        alike = torch.ones(self.count, dtype=torch.bool, device=device)
        blocks = self.folder.blocks(self.sources, self.run, self.start, self.count)
        for block, weight, mask in zip(blocks, self.weights, self._masks(), strict=True):
            values, here = block.to(torch.float64), mask > 0
            first = torch.where(here & (divisor == 0), values, first)
            alike &= ~here | (values == first)
            share = mask * weight
            total += torch.where(here, values * share, nothing)
            divisor += share
        sent = divisor > 0
        mean = total / torch.where(sent, divisor, 1.0)
        mean = torch.where(alike & (first != 0), first, mean)
        return self._else_kept(mean, sent), sent

    def rounded(self) -> tuple[Tensor, Tensor]:
        """float64 that the run's dtype rounds to what is nearest to the exact mean."""
        anybody = self.masks.anybody(self.sources, self.index, self.start, self.count)
        sent = anybody.to(self.folder.device)
        if self.run.dtype == "F64":
            mean, doubtful = mean_of_float64(self._blocks, self.weights, self._divisor)
        else:
            mean, doubtful = self._of_narrow(sent)
        doubtful = doubtful[sent[doubtful]]
        self.folder.settle(
            mean, doubtful, self.sources, self.weights, self.run, self.start, self._sent
        )
        return self._else_kept(mean, sent), sent

    def _of_narrow(self, sent: Tensor) -> tuple[Tensor, Tensor]:
        """Means of up to 32 bits, and the indices of those that float64 may have got wrong."""
        mean = torch.full((self.count,), -0.0, dtype=torch.float64, device=self.folder.device)
        sizes, divisor = torch.full_like(mean, LEAST), torch.zeros_like(mean)
        for block, weight, mask in zip(self._blocks(), self.weights, self._masks(), strict=True):
            term = block.to(torch.float64).mul_(weight)
            mean.add_(term)
            sizes.add_(term.abs_())
            divisor.add_(mask, alpha=weight)
        divisor.masked_fill_(~sent, 1.0)
        mean.div_(divisor)
        off = sizes.div_(divisor).mul_(unit_where_sent(len(self.sources)))
        return mean, undecided(mean, off, FLOATS[self.run.dtype])

    def _else_kept(self, mean: Tensor, sent: Tensor) -> Tensor:
        x = self.folder.rows([self.base], self.run, self.start, self.count)[0]
        return torch.where(sent, mean, x.to(torch.float64))

    def _blocks(self) -> Iterator[Tensor]:
        """Each update's numbers, with -0 for those that it left out: x + -0 is x, -0 included."""
        blocks = self.folder.blocks(self.sources, self.run, self.start, self.count)
        for block, mask in zip(blocks, self._masks(), strict=True):
            yield torch.where(mask > 0, block.to(torch.float64), -0.0) if mask.dim() else block

    def _masks(self) -> Iterator[Tensor]:
        """(count,) float64 for each update, 1 where it sent a number; a single 1 if it is whole."""
        for bits in self.masks.each(self.sources, self.index, self.start, self.count):
            yield (
                torch.ones(()).double()
                if bits is None
                else bits.to(self.folder.device, torch.float64)
            )

    def _divisor(self, weights: Sequence[float]) -> Divisor:
        return sum_over(self._masks(), weights)

    def _sent(self, where: Tensor) -> Tensor:
        return self.masks.at(self.sources, self.index, self.start, where.cpu())
