"""How a round closes: its part of a training's options, frozen on the round, and the decision itself."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from typing import Any

from django.conf import settings

BACK_OFF = (2.0, 10.0, 30.0, 60.0)  # seconds before a failed participant is asked again


@dataclass(frozen=True)
class RoundPolicy:
    """When a round closes, and what becomes of those who fail; names as in the wire contract."""

    round_deadline: float | None = field(
        default=None,
        metadata={
            "doc": "Seconds a round or test waits, at most a year; the server's default if null.",
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
    max_failure_rate: float | None = field(
        default=None,
        metadata={
            "doc": "End the training as soon as more than this part of those who were asked has "
            "failed; if null 0 with the failure policy fail, 1 with drop.",
            "ge": 0.0,
            "le": 1.0,
        },
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


POLICY_FIELDS = tuple(option.name for option in fields(RoundPolicy))


def policy_faults(policy: RoundPolicy) -> Iterator[tuple[str, str]]:
    """Options that contradict each other: (name, what is wrong)."""
    if policy.failure_policy == "wait" and policy.max_failure_rate is not None:
        yield "max_failure_rate", "means nothing with the failure policy wait: nobody is given up"


def policy_frozen(options: RoundPolicy) -> dict[str, Any]:
    """What is stored on a round that opens now."""
    known = asdict(options)
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

    @property
    def asked(self) -> int:
        """Those who were taken out of the training count no more."""
        return self.open + self.done + self.lost


class Step(StrEnum):
    """What a round does next."""

    WAIT = "wait"
    AGAIN = "ask the missing again"
    CLOSE = "close"
    FAIL = "fail"


def decide(policy: RoundPolicy, now: Standing) -> tuple[Step, str]:
    """The next step, and why a round fails if not for want of updates ("CODE: sentence"). Asking twice changes nothing."""
    lost = now.lost + (now.open if now.overdue else 0)
    if policy.failure_policy == "wait":
        if lost:
            return Step.AGAIN, ""
    elif now.asked and lost / now.asked > policy.failure_limit:
        return Step.FAIL, (
            f"TOO_MANY_FAILURES: {lost} of {now.asked} sites failed, {policy.failure_limit:.0%} may"
        )
    if now.open and not now.overdue:
        return Step.WAIT, ""
    if now.done < policy.min_updates:
        return Step.FAIL, ""
    return Step.CLOSE, ""
