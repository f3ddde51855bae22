"""What a training requires of its participants, and what of it a participant lacks. Nothing but functions.

A requirement is a name and a condition: a value that the attribute has to be, or, where it is a list, to hold; a
list of values of which one will do; or `{"min": ..., "max": ...}`, both inclusive, for numbers. The name
`num_examples` is the number of examples that the participant has said, `capability` one of its kinds of tasks.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

MAX_REQUIREMENTS = 50
PLAIN = (str, int, float, bool)


@dataclass(frozen=True)
class Lack:
    """One requirement that is not met; `got` is None where nothing was said."""

    name: str
    expected: Any
    got: Any

    @property
    def text(self) -> str:
        """Like "num_examples: at least 100 is required, it says 20"."""
        said = "it has not said" if self.got is None else f"it says {self.got!r}"
        return f"{self.name}: {_spoken(self.expected)} is required, {said}"


def lacks(require: Mapping[str, Any], known: Mapping[str, Any]) -> list[Lack]:
    """Every requirement that these attributes do not meet, by name."""
    return [
        Lack(name, require[name], known.get(name))
        for name in sorted(require)
        if not _met(require[name], known.get(name))
    ]


def requirement_faults(require: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What is wrong with requirements: (name, why)."""
    if len(require) > MAX_REQUIREMENTS:
        yield "", f"at most {MAX_REQUIREMENTS} requirements"
    for name, condition in require.items():
        if isinstance(condition, Mapping):
            numbers = [value for value in condition.values() if _number(value)]
            if not condition or set(condition) - {"min", "max"} or len(numbers) < len(condition):
                yield name, "min and max are numbers, and there is one of them at least"
        elif isinstance(condition, list):
            if not condition or not all(isinstance(value, PLAIN) for value in condition):
                yield name, "a list of strings, numbers or truth values, of which one will do"
        elif not isinstance(condition, PLAIN):
            yield name, "a value, a list of values, or an object with min or max"


def _met(condition: Any, value: Any) -> bool:
    if value is None:
        return False
    if isinstance(condition, Mapping):
        if not _number(value):
            return False
        low, high = condition.get("min"), condition.get("max")
        return (low is None or value >= low) and (high is None or value <= high)
    wanted = condition if isinstance(condition, list) else [condition]
    there = value if isinstance(value, list) else [value]
    return any(_same(one, other) for one in wanted for other in there)


def _same(one: Any, other: Any) -> bool:
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _spoken(condition: Any) -> str:
    if isinstance(condition, Mapping):
        words = {"min": "at least", "max": "at most"}
        return " and ".join(f"{words[key]} {condition[key]}" for key in words if key in condition)
    if isinstance(condition, list):
        return "one of " + ", ".join(repr(value) for value in condition)
    return repr(condition)
