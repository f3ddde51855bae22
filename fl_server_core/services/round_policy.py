"""How a round closes: its part of a training's options, frozen on the round, and the decision itself."""

import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from typing import Any

from django.conf import settings

from fl_server_core.services import staleness
from fl_server_core.services.requirements import requirement_faults
from fl_server_core.services.sampling import COUNTED, KINDS, SHARED, sample_goal

MODES = ("sync", "buffered", "async")
BACK_OFF = (2.0, 10.0, 30.0, 60.0)  # seconds before a failed participant is asked again


@dataclass(frozen=True)
class RoundPolicy:
    """When a round closes, and what becomes of those who fail; names as in the wire contract."""

    round_deadline: float | None = field(
        default=None,
        metadata={
            "doc": "Seconds a round or test waits, at most a year; the server's default if null. Where sites "
            "report progress it may last up to twice as long, see progress_extends.",
            "gt": 0.0,
            "le": 31_536_000,
        },
    )
    min_updates: int = field(
        default=1,
        metadata={"doc": "A round with fewer updates at its end fails.", "ge": 1, "le": 100_000},
    )
    failure_policy: str = field(
        default="drop",
        metadata={
            "doc": "Who fails is left out of the round (drop); is asked again until the update is "
            "there, past any deadline (wait); or ends the training (fail).",
            "choices": ("drop", "wait", "fail"),
        },
    )
    refused_retries: int = field(
        default=0,
        metadata={
            "doc": "A site whose update was looked at and refused is asked again at once, until it was asked so "
            "many times more in the round; after that it has failed, and the failure policy decides.",
            "ge": 0,
            "le": 100,
        },
    )
    max_failure_rate: float | None = field(
        default=None,
        metadata={
            "doc": "End the training as soon as more than this part of those who were asked has "
            "failed; if null 0 with the failure policy fail, 1 with drop.",
            "ge": 0.0,
            "le": 1.0,
        },
    )

    sampling: str = field(
        default="all",
        metadata={
            "doc": "Who is asked in a round: all; a fixed number; a fraction; each with a probability "
            "(poisson); in turn (round_robin); or the same ones as long as they are there (sticky).",
            "choices": KINDS,
        },
    )
    clients_per_round: int | None = field(
        default=None,
        metadata={
            "doc": "How many are asked with fixed, round_robin and sticky.",
            "ge": 1,
            "le": 100_000,
        },
    )
    client_fraction: float | None = field(
        default=None,
        metadata={
            "doc": "Which part is asked with fraction (rounded up); the probability with poisson.",
            "gt": 0.0,
            "le": 1.0,
        },
    )
    over_selection: float = field(
        default=1.0,
        metadata={
            "doc": "Ask so many times more than sampling says, and close the round with the updates "
            "that come first.",
            "ge": 1.0,
            "le": 10.0,
        },
    )
    seen_within: float | None = field(
        default=None,
        metadata={
            "doc": "Ask only those who contacted the server within so many seconds; contacts are noted "
            "once a minute.",
            "ge": 90.0,
        },
    )
    require: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "doc": "What a participant must have said of itself when it joined, to be asked: attributes, "
            "num_examples or capability with a value, a list of which one will do, or min and max. The first "
            "round waits for everybody until its deadline.",
        },
    )
    required: list[str] = field(
        default_factory=list,
        metadata={"doc": "Ids of participants without whose update no round closes."},
    )
    buffer_size: int | None = field(
        default=None,
        metadata={
            "doc": "Close the round with so many updates although more were asked for.",
            "ge": 1,
            "le": 100_000,
        },
    )
    at_deadline: str = field(
        default="aggregate",
        metadata={
            "doc": "When the deadline passes: go on with min_updates, with fewer the training fails "
            "(aggregate); with fewer wait longer (extend) or keep the model and count the round "
            "(skip); or fail if anybody is missing (fail).",
            "choices": ("aggregate", "extend", "skip", "fail"),
        },
    )
    max_extensions: int = field(
        default=3,
        metadata={
            "doc": "How often a round is extended before it fails.",
            "ge": 1,
            "le": 1_000,
        },
    )
    deadline_factor: float | None = field(
        default=None,
        metadata={
            "doc": "An adaptive deadline: so many times what nine of ten participants needed in the last "
            "five rounds; round_deadline is the longest.",
            "ge": 1.0,
            "le": 100.0,
        },
    )
    check_in: float | None = field(
        default=None,
        metadata={
            "doc": "Seconds after which a client without a task is told to come back, spread over half to "
            "one and a half times that.",
            "gt": 0.0,
            "le": 86_400,
        },
    )
    progress_extends: float = field(
        default=1.0,
        metadata={
            "doc": "At its deadline a phase goes on for sites that report progress, at most for so many "
            "times its length. 0: a deadline is a deadline.",
            "ge": 0.0,
            "le": 1_000.0,
        },
    )

    mode: str | None = field(
        default=None,
        metadata={
            "doc": "Rounds that wait for their sample (sync); a step with every buffer_size updates, whichever "
            "version they started from (buffered), or with every single one (async); if null what "
            "the strategy is for.",
            "choices": MODES,
        },
    )
    late_updates: str = field(
        default="refuse",
        metadata={
            "doc": "An update that comes after its round has closed is refused, or counts in the next one "
            "with a staleness weight (next_round).",
            "choices": ("refuse", "next_round"),
        },
    )
    max_staleness: int = field(
        default=16,
        metadata={"doc": "Updates from more versions ago are refused.", "ge": 0, "le": 100_000},
    )
    staleness_weight: str = field(
        default="polynomial",
        metadata={
            "doc": "What a stale update counts, s versions later: 1 (constant), (1 + s)^-a (polynomial), or 1 up "
            "to b versions and then 1 / (a (s - b) + 1) (hinge).",
            "choices": staleness.KINDS,
        },
    )
    staleness_a: float | None = field(
        default=None,
        metadata={
            "doc": "The a of the staleness weight; 0.5 for polynomial and 10 for hinge if null.",
            "ge": 0.0,
            "le": 1_000.0,
        },
    )
    staleness_b: int = field(
        default=4, metadata={"doc": "The b of the weight hinge.", "ge": 0, "le": 100_000}
    )

    @property
    def buffered(self) -> bool:
        """Whether parts outlive their rounds."""
        return self.mode in {"buffered", "async"}

    @property
    def selective(self) -> bool:
        """Whether some participants may not be asked now, and later may."""
        return self.seen_within is not None or bool(self.require)

    @property
    def takes_late(self) -> bool:
        """Whether an update may count in a later round than the one it answers."""
        return self.buffered or self.late_updates == "next_round"

    def discount(self, versions: int) -> float:
        """What an update counts that is so many versions old."""
        return staleness.discount(
            self.staleness_weight, versions, a=self.staleness_a, b=self.staleness_b
        )

    @property
    def seconds(self) -> float:
        """How long a phase may last. There is always an end: nothing waits for ever unasked."""
        return settings.FL_ROUND_SECONDS if self.round_deadline is None else self.round_deadline

    @property
    def failure_limit(self) -> float:
        """The part of those who were asked that may fail."""
        if self.max_failure_rate is not None:
            return self.max_failure_rate
        return 0.0 if self.failure_policy == "fail" else 1.0

    def goal(self, candidates: int) -> int:
        """The most updates that a round can come to when so many may be asked."""
        goal = sample_goal(
            self.sampling,
            candidates=candidates,
            count=self.clients_per_round or 1,
            fraction=self.client_fraction or 1.0,
        )
        if self.buffered:  # who has delivered makes room for others
            goal = candidates
        goal = min(candidates, max(goal, len(self.required)))
        return goal if self.buffer_size is None else min(goal, self.buffer_size)


POLICY_FIELDS = tuple(option.name for option in fields(RoundPolicy))


def policy_faults(policy: RoundPolicy) -> Iterator[tuple[str, str]]:
    """Options that contradict each other: (name, what is wrong)."""
    kind, count = policy.sampling, policy.clients_per_round
    if policy.failure_policy == "wait" and policy.max_failure_rate is not None:
        yield "max_failure_rate", "means nothing with the failure policy wait: nobody is given up"
    if policy.failure_policy == "wait" and policy.at_deadline != "aggregate":
        yield "at_deadline", "means nothing with the failure policy wait: the deadline is moved"
    for name, said in requirement_faults(policy.require):
        yield f"require/{name}".rstrip("/"), said
    if policy.mode == "buffered" and policy.buffer_size is None:
        yield "buffer_size", "how many updates make a step, in the mode buffered"
    if policy.buffered and kind not in {"all", "fixed"}:
        yield (
            "sampling",
            "all or, for a limit on who trains at a time, fixed, in asynchronous modes",
        )
    if policy.buffered and policy.required:
        yield "required", "means nothing in asynchronous modes: a step takes the updates that come"
    if policy.buffered and policy.over_selection > 1:
        yield "over_selection", "means nothing in asynchronous modes: nobody's work is thrown away"
    if policy.mode == "async" and policy.buffer_size not in {None, 1}:
        yield "buffer_size", "1 in the mode async; with more it is buffered"
    if (kind in COUNTED) != (count is not None):
        yield "clients_per_round", _both("clients_per_round", count is not None, COUNTED, kind)
    if (kind in SHARED) != (policy.client_fraction is not None):
        given = policy.client_fraction is not None
        yield "client_fraction", _both("client_fraction", given, SHARED, kind)
    if policy.over_selection > 1 and kind in {"all", "poisson"}:
        yield "over_selection", f"the sampling {kind} aims at no number that could be exceeded"
    if len(set(policy.required)) != len(policy.required) or not all(map(_is_id, policy.required)):
        yield "required", "a list of different user ids"
    most = policy.goal(1_000_000)
    if policy.min_updates > most:
        yield "min_updates", f"a round comes to {most} updates at most with these options"


def _both(option: str, given: bool, kinds: Iterable[str], kind: str) -> str:
    if given:
        return f"means nothing with the sampling {kind}; it belongs to {', '.join(sorted(kinds))}"
    return f"the sampling {kind} needs {option}"


def _is_id(text: str) -> bool:
    try:
        return str(uuid.UUID(text)) == text
    except ValueError:
        return False


def policy_frozen(policy: RoundPolicy) -> dict[str, Any]:
    """What is stored on a round that opens now."""
    known = asdict(policy)
    return {name: known[name] for name in POLICY_FIELDS}


def policy_of(stored: Mapping[str, Any]) -> RoundPolicy:
    """A round's own policy; what its row does not know yet has the default."""
    return RoundPolicy(**{name: stored[name] for name in POLICY_FIELDS if name in stored})


def pause_before(attempt: int) -> float:
    """Seconds between the end of a participant's attempt (from 1) and being asked again."""
    return BACK_OFF[min(attempt, len(BACK_OFF)) - 1]


@dataclass(frozen=True)
class Standing:
    """What the decision looks at: how the parts of those asked stand, counted from rows."""

    open: int
    done: int
    lost: int  # failed, or expired
    overdue: bool  # the deadline has passed
    required_missing: int = 0
    extensions: int = 0
    held: int = 0  # updates in quarantine: somebody may release or refuse them until the deadline

    @property
    def asked(self) -> int:
        """Those who were taken out of the training count no more."""
        return self.open + self.done + self.lost + self.held


class Step(StrEnum):
    """What a round does next."""

    WAIT = "wait"
    AGAIN = "ask the missing again"
    EXTEND = "ask the missing again, a limited number of times"
    CLOSE = "close"
    SKIP = "keep the model and go on"
    FAIL = "fail"


def are_needed(number: int) -> str:
    """How many are needed, as words."""
    return f"{number} {'is' if number == 1 else 'are'} needed"


def decide(policy: RoundPolicy, now: Standing) -> tuple[Step, str]:
    """The next step, and why a round fails if not for want of updates ("CODE: sentence").

    Asking twice changes nothing. Every round that is not waiting for an open part or its deadline gets a
    step that moves it: there is no standing from which nothing follows.
    """
    quorum = now.done >= policy.min_updates and not now.required_missing
    if quorum and policy.buffer_size is not None and now.done >= policy.buffer_size:
        return Step.CLOSE, ""
    missing = now.open + now.held
    lost = now.lost + (missing if now.overdue else 0)
    if policy.failure_policy == "wait":
        if lost:
            return Step.AGAIN, ""
    elif now.asked and lost / now.asked > policy.failure_limit:
        return Step.FAIL, (
            f"TOO_MANY_FAILURES: {lost} of {now.asked} sites failed, {policy.failure_limit:.0%} may"
        )
    if missing and not now.overdue:
        return Step.WAIT, ""
    if now.overdue and missing and policy.at_deadline == "fail":
        held = f", {now.held} updates are in quarantine" if now.held else ""
        return Step.FAIL, (
            f"DEADLINE_MISSED: {now.open} of {now.asked} sites sent nothing in time{held}"
        )
    if quorum:
        return Step.CLOSE, ""
    anybody = now.overdue or now.lost  # else nobody is left who could be asked again
    if policy.at_deadline == "extend" and anybody and now.extensions < policy.max_extensions:
        return Step.EXTEND, ""
    return (Step.SKIP if policy.at_deadline == "skip" else Step.FAIL), ""
