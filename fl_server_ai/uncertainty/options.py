"""Options of the uncertainty methods: the shared ones, and how those from outside are checked."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

from fl_server_ai.aggregation import options as scalars
from fl_server_core.exceptions import Invalid

TASKS = ("multiclass", "multilabel", "binary", "regression")
OUTPUTS = ("logits", "probs")
MAX_DRAWS = 1000
MAX_QUANTILES = 100
POINTER = "/options/uncertainty"


@dataclass(frozen=True)
class CommonOptions:
    """Every method takes these, so that a request can change the method alone.

    `reads_logits` and `reads_probs` say how outputs are understood; where both are False, as by default,
    outputs are averaged as they come.
    """

    N: int = field(
        default=10,
        metadata={"ge": 1, "le": MAX_DRAWS, "doc": "How many draws, where the method makes draws."},
    )
    seed: int = field(
        default=0,
        metadata={
            "ge": 0,
            "lt": 2**53,
            "doc": "The same seed gives the same answer, where the method makes draws.",
        },
    )
    task: str = field(
        default="multiclass", metadata={"choices": TASKS, "doc": "What the outputs stand for."}
    )
    output: str | None = field(
        default=None,
        metadata={
            "choices": OUTPUTS,
            "doc": "What the model gives. Logits are made probabilities before anything else. null: "
            "outputs are averaged as they come, and have entropies if each multiclass sample sums "
            "to one.",
        },
    )
    softmax: bool = field(
        default=False, metadata={"doc": "The model gives logits; the same as output: logits."}
    )
    quantiles: list[float] = field(
        default_factory=lambda: [0.05, 0.5, 0.95],
        metadata={"doc": "Which quantiles of the draws a regression is told, between 0 and 1."},
    )

    @property
    def reads_logits(self) -> bool:
        return self.task != "regression" and (self.softmax or self.output == "logits")

    @property
    def reads_probs(self) -> bool:
        return self.task != "regression" and not self.softmax and self.output == "probs"

    def faults(self) -> Iterator[tuple[str, str, str]]:
        """What is wrong with these options together: field, code, detail."""
        if self.softmax and self.output == "probs":
            yield (
                "softmax",
                "contradiction",
                "probabilities need no softmax: leave out one of the two",
            )
        if self.task == "regression" and (self.softmax or self.output):
            name = "softmax" if self.softmax else "output"
            yield name, "contradiction", "a regression has neither logits nor probabilities"


OptionsT = TypeVar("OptionsT", bound=CommonOptions)


def parse_options(
    cls: type[OptionsT], mapping: Mapping[str, Any], *, pointer: str = POINTER
) -> OptionsT:
    """Make a `cls` of `mapping`, or raise `Invalid` (BAD_OPTION) whose data names every fault."""
    rest = {name: value for name, value in mapping.items() if name != "quantiles"}
    errors: list[dict[str, str]] = []
    options: OptionsT | None = None
    try:
        options = scalars.parse_options(cls, rest, pointer=pointer)
    except Invalid as refusal:
        errors += refusal.data["errors"]
    levels: list[float] = []
    if "quantiles" in mapping:
        try:
            levels = _levels(mapping["quantiles"])
        except ValueError as fault:
            code, detail = fault.args
            errors.append({"pointer": f"{pointer}/quantiles", "code": code, "detail": detail})
        else:
            options = options and replace(options, quantiles=levels)
    if options is not None:
        errors += [
            {"pointer": f"{pointer}/{name}", "code": code, "detail": detail}
            for name, code, detail in options.faults()
        ]
    if errors or options is None:
        where = ", ".join(error["pointer"] for error in errors)
        raise Invalid(f"bad options: {where}", code="BAD_OPTION", errors=errors)
    return options


def merge_options(
    cls: type[OptionsT],
    defaults: Mapping[str, Any],
    given: Mapping[str, Any],
    *,
    pointer: str = POINTER,
) -> OptionsT:
    """A request's options over its training's. Defaults meant for another method are left out."""
    known = {field.name for field in fields(cls)}
    kept = {name: value for name, value in defaults.items() if name in known}
    if "output" in given or "softmax" in given:  # two ways to say one thing: the request's counts
        kept = {name: value for name, value in kept.items() if name not in ("output", "softmax")}
    if given.get("task") == "regression":
        kept = {name: value for name, value in kept.items() if name not in ("output", "softmax")}
    return parse_options(cls, kept | dict(given), pointer=pointer)


def schema(cls: type[CommonOptions]) -> dict[str, Any]:
    """JSON schema (2020-12) of what `parse_options` takes for `cls`."""
    result = scalars.schema(cls)
    result["properties"]["output"]["enum"] = [*OUTPUTS, None]
    result["properties"]["quantiles"] |= {
        "items": {"type": "number", "minimum": 0, "maximum": 1},
        "maxItems": MAX_QUANTILES,
    }
    return result


def _levels(value: Any) -> list[float]:
    if not isinstance(value, list | tuple) or any(type(item) not in (int, float) for item in value):
        raise ValueError("type", "must be a list of numbers")
    levels = [float(item) for item in value if 0 <= item <= 1]  # NaN is not kept either
    if len(levels) < len(value) or not all(map(math.isfinite, levels)):
        raise ValueError("range", "must lie between 0 and 1")
    if len(levels) > MAX_QUANTILES:
        raise ValueError("range", f"must be at most {MAX_QUANTILES}")
    return sorted(set(levels))
