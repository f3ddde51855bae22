"""The one interface of all uncertainty methods: they say which draws are needed, and run nothing."""

from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar, Generic, TypeVar

from fl_server_ai.uncertainty.options import CommonOptions
from fl_server_ai.uncertainty.seeds import stream_key

OptionsT = TypeVar("OptionsT", bound=CommonOptions)


class Kind(StrEnum):
    """What differs from draw to draw."""

    PLAIN = "plain"  # nothing: one run in evaluation mode
    DROPOUT = "dropout"  # the same weights, dropout layers at work
    WEIGHTS = "weights"  # weights drawn from the model's moments
    MEMBERS = "members"  # each member of a MEAN model in turn


@dataclass(frozen=True)
class DrawPlan:
    """`draws` is None where the model decides: one a member."""

    kind: Kind
    draws: int | None
    seed: int

    def torch_seed(self, draw: int) -> int:
        """For `torch.manual_seed` before this draw, so that it depends on no other."""
        return stream_key(self.seed, draw, "torch", bits=56)


class Method(Generic[OptionsT]):
    """A way of asking a model how sure it is."""

    Options: ClassVar[type[CommonOptions]] = CommonOptions
    paper: ClassVar[str] = ""  # arXiv id
    kind: ClassVar[Kind] = Kind.PLAIN

    def __init__(self, options: OptionsT | None = None) -> None:
        self.options: OptionsT = self.Options() if options is None else options  # type: ignore[assignment]

    def plan(self) -> DrawPlan:
        """The draws to make; their outputs go to `summary.Summary`."""
        return DrawPlan(self.kind, self.options.N, self.options.seed)
