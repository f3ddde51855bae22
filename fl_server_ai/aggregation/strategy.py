"""The one interface of all aggregation strategies."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

OptionsT = TypeVar("OptionsT")
# Namespaces that no extra may have: of encodings, and of what may come.
RESERVED = frozenset({"enc", "fl", "server"})
FAR = 1e30  # where extras end: their sums over updates and rounds still fit into a float32


@dataclass(frozen=True)
class UpdateMeta:
    """What is known of an update besides its tensors; `participant` is unique within a round.

    It is the id of who sent the update; in daisy chains, whose models several have trained, some other name.
    `extras` are the numbers that came with it, by name without `extra.`; `largest` is the largest
    |update - base| of all float numbers, where the strategy `needs_largest`; infinity if any is none.
    """

    participant: str
    num_examples: int
    num_steps: int | None = None
    extras: Mapping[str, float] = field(default_factory=dict)
    largest: float | None = None
    staleness: int = 0  # versions between the one it was trained from and the current one
    discount: float = 1.0  # what staleness leaves of its weight; the engine multiplies


@dataclass(frozen=True)
class Extra:
    """What clients send beside the weights, under `extra.<name>` in the same file.

    `name` is `<namespace>.<name>` of letters, digits, `_` and `-`, in no namespace of `RESERVED`. Per tensor it is a
    vector as long as the float numbers of the model, sent as `extra.<name>.<tensor>` in the tensor's shape; tensors
    that are not sent are zero. Else a number.
    An update with a number below `minimum` or above `maximum`, 1e30 either way if None, is refused (EXTRA_RANGE).
    """

    name: str
    doc: str
    per_tensor: bool = False
    required: bool = True
    minimum: float | None = None
    maximum: float | None = None

    @property
    def limits(self) -> tuple[float, float]:
        """The least and the most that each number may be."""
        return (
            -FAR if self.minimum is None else self.minimum,
            FAR if self.maximum is None else self.maximum,
        )


@dataclass(frozen=True)
class RoundFacts:
    """What a strategy may know of its training: fixed when the round asked, the same at every attempt."""

    number: int = 0  # of the round, from 0
    rounds: int = 0  # that the training was asked for; 0: unknown
    population: int = 0  # participants of the training, in this round or not; 0: unknown
    actor: str = ""  # whose training it is


@dataclass(frozen=True)
class Refused:
    """A strategy's reason for not using an update; the participant reads it."""

    reason: str


@dataclass(frozen=True)
class NoOptions:
    """For strategies that cannot be adjusted."""


def sample_weights(metas: Sequence[UpdateMeta], weighting: str) -> list[int]:
    """One weight an update: its sample size for "samples", 1 for "uniform"."""
    return [meta.num_examples if weighting == "samples" else 1 for meta in metas]


def weighting_field(default: str = "samples") -> Any:
    """The option that `sample_weights` reads."""
    return field(
        default=default,
        metadata={
            "choices": ("samples", "uniform"),
            "doc": "Weigh updates by their sample size, or all alike.",
        },
    )


class Strategy(Generic[OptionsT]):
    """A rule that makes one model of many updates, seen block by block.

    A linear rule overrides `weights`, a coordinate-wise one `reduce`; either may override `update`, which
    says how the server moves. An instance serves one round; `state_dict` and `state_blocks` carry over.
    The metas are sorted by participant, and everything else comes in the order of the metas.
    """

    Options: ClassVar[type[Any]] = NoOptions
    paper: ClassVar[str] = ""  # arXiv id
    needs_gram: ClassVar[bool] = False
    # Of the Gram matrix it uses distances between updates alone: any origin does.
    needs_distances: ClassVar[bool] = False
    # A state block that the Gram matrix has a last row and column for, as if it were (update - base).
    gram_block: ClassVar[str] = ""
    mode: ClassVar[str] = "sync"  # the mode that trainings with this strategy have by default
    # Whether stale updates are moved to where they would be, had they started from the current model.
    # Gradients and masks never are: they are no places.
    rebases: ClassVar[bool] = True
    # Why an update of an older version can't count, for what is asked for at creation; empty if it can.
    only_fresh: ClassVar[str] = ""
    assumes: ClassVar[str] = ""  # why a round needs `fewest()` updates, as a formula
    # Each of these names is a vector with one number per float parameter, kept from round to round.
    state_blocks: ClassVar[tuple[str, ...]] = ()
    # Of these, means over all participants of something that each keeps. As participants join and leave, the
    # engine scales them: N times the block stays the sum.
    population_means: ClassVar[tuple[str, ...]] = ()
    # What clients keep of the state themselves, in words; empty: nothing. It is of one training, so a later one
    # can't go on with the server's part alone (`reset_state`).
    clients_keep: ClassVar[str] = ""
    # State blocks that clients get with their next task, by the names that they have there.
    shared: ClassVar[Mapping[str, str]] = MappingProxyType({})
    takes: ClassVar[str] = "weights"  # or "gradient", or "mask": zeros and ones
    # Each number is combined for itself, so updates may leave some out; else they count as a whole. `reduce`
    # then gets the rows of those who sent a tensor: fewer than `fewest()`, perhaps one.
    by_number: ClassVar[bool] = False
    needs_steps: ClassVar[bool] = False  # updates without `num_steps` are refused
    needs_largest: ClassVar[bool] = False
    # Whether `meta.participant` must be the id of who sent the update: in a daisy chain it is none,
    # a model has been trained by several there.
    knows_participants: ClassVar[bool] = False
    # Whether weights that are all zero mean that the model stays as it is, and not an error.
    may_keep: ClassVar[bool] = False

    def __init__(self, options: OptionsT | None = None) -> None:
        self.options: OptionsT = self.Options() if options is None else options
        self.facts = RoundFacts()

    def extras(self) -> tuple[Extra, ...]:
        """What clients have to send beside the weights, with these options."""
        return ()

    def fewest(self) -> int:
        """Updates that a round must have with these options; with fewer, aggregating is refused."""
        return 1

    def population(self, updates: int) -> int:
        """N: all participants of the training, in this round of so many updates or not."""
        return max(updates, self.facts.population)

    def admit(self, meta: UpdateMeta) -> Refused | None:
        """Look at what came with an update besides its tensors, when it is uploaded; None takes it.

        A refusal is answered at once (422 EXTRA_RANGE). It keeps one update from spoiling the whole round. The
        web process asks: no torch.
        """
        return None

    def check(
        self, meta: UpdateMeta, tensors: "Mapping[str, Tensor]"
    ) -> "Refused | Mapping[str, Tensor] | None":
        """Look at an update when it has arrived: None keeps it, tensors replace it."""
        return None

    def weights(self, metas: Sequence[UpdateMeta], gram: "Tensor | None") -> Sequence[float]:
        """Finite weights >= 0, not all zero; the engine divides by their sum. Called once a round.

        An update of weight 0 is not read. `gram` is given if `needs_gram`: (n, n), float64, the inner
        products of (update - base) over all float tensors; with a `gram_block` (n + 1, n + 1). Integer buffers follow these weights
        also where `reduce` is overridden.
        """
        return sample_weights(metas, "samples")

    def reduce(self, rows: "Tensor") -> "Tensor":
        """(n, block) in the tensor's own dtype to (block,); overriding it replaces the weighted mean.

        The rows are those of the updates whose weight is not 0, in the order of the metas.
        """
        raise NotImplementedError

    def update(self, x: "Tensor", y: "Tensor", state: "dict[str, Tensor]") -> "Tensor":
        """The new block: `x` is the base's, `y` the combined updates', both (block,) float64.

        `state` holds a float64 block for every name in `state_blocks`; assign to its keys, or change
        the blocks in place. It is stored as float32, for float64 tensors as float64. It also holds, under
        its name, the unweighted mean of each per-tensor extra over all updates of the round.
        Statistics (`statistics.py`) never come here, nor does the state of theirs change.
        """
        return y

    def statistics(self, x: "Tensor", y: "Tensor") -> "Tensor":
        """What becomes of running means and variances where there is an `update`, which is for weights.

        `x` and `y` are as in `update`. A variance that goes beyond its mean may fall below 0, so what is given
        back must lie between the two: `y`, or nearer to `x` where the rule limits what updates count.
        Not asked where the strategy `takes` gradients, which statistics have none of: they stay. In
        masks all tensors are probabilities.
        """
        return y

    def initial_state(self) -> Mapping[str, float]:
        """What a state block is filled with before the first round; 0 where a name is left out."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Scalars to keep from round to round, as JSON."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave; called before `weights`."""

    def client_config(self) -> dict[str, Any]:
        """What clients must know to play their part; travels in every training task.

        The state of the model's current version is loaded before.
        """
        return {}
