"""Mean of the middle half of every coordinate: Yin et al. 2018, https://arxiv.org/abs/1803.01498."""

from dataclasses import dataclass, field

from fl_server_ai.aggregation import STRATEGIES, Refused, Strategy


@dataclass(frozen=True)
class MiddleHalfOptions:
    """How much is cut off."""

    trim: float = field(default=0.25, metadata={"ge": 0.0, "lt": 0.5, "doc": "Share at each end."})


@STRATEGIES.register("MiddleHalf")
class MiddleHalf(Strategy[MiddleHalfOptions]):
    """Drop the extremes of every coordinate, then average the rest; sample sizes don't count."""

    Options = MiddleHalfOptions
    paper = "1803.01498"

    def check(self, meta, tensors):  # when an update has arrived; None keeps it
        return Refused("one example is no data set") if meta.num_examples < 2 else None

    def reduce(self, rows):  # (updates, block) to (block,)
        cut = int(self.options.trim * len(rows))
        return rows.double().sort(dim=0).values[cut : len(rows) - cut].mean(dim=0)
