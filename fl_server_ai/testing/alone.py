"""Promises of the class alone, without a round: its description, its options, and the hook `check`."""

import copy
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import torch

from fl_server_ai.aggregation import Refused, UpdateMeta
from fl_server_ai.aggregation.fitness import UnfitStrategy, check_extras, check_fit
from fl_server_ai.aggregation.options import parse_options, schema
from fl_server_ai.aggregation.strategy import Strategy
from fl_server_ai.testing.rounds import Rounds, broken, expect, expected, random_model
from fl_server_core.exceptions import Invalid

TYPES = {"integer": "x", "number": "x", "boolean": "x", "string": 1.5, "array": "x", "object": "x"}


def description(rounds: Rounds) -> None:
    """It can be listed: a frozen options dataclass with defaults and texts, a source, JSON for clients."""
    kind = rounds.kind
    name = kind.__name__[:64]
    try:
        check_fit(name, kind)
        check_extras(name, rounds.new().extras())  # with these options they may be others
    except UnfitStrategy as error:
        broken(str(error))
    # A rule of one's own may have no paper; those that come with the server all do.
    own = not kind.paper and not kind.__module__.startswith("fl_server_ai.")
    expect(
        own or re.fullmatch(r"\d{4}\.\d{4,5}|https://\S+", kind.paper),
        f"paper is {kind.paper!r}; give an arXiv id or an https URL",
    )
    expect((kind.__doc__ or "").strip(), "the class has no docstring, and the docs need a line")
    for name, entry in schema(kind.Options)["properties"].items():
        expect(entry.get("description"), f"the option {name!r} has no doc in its metadata")


def bad_options(rounds: Rounds) -> None:
    """Unknown, mistyped and out-of-range options are refused by pointer; an integer will do for a float."""
    kind = rounds.kind.Options
    described = schema(kind)["properties"]
    bad: dict[str, Any] = {"no_such_option": 1}
    bad |= {option.name: object() for option in fields(kind)}
    _refused(rounds, bad, set(bad))
    for name, entry in described.items():
        types = [entry["type"]] if isinstance(entry["type"], str) else entry["type"]
        _refused(rounds, {name: TYPES[types[0]]}, {name})
        if "number" in types:
            _refused(rounds, {name: math.nan}, {name})
        for value in _beyond(entry):
            _refused(rounds, {name: value}, {name})
        if "number" in types and (whole := _whole(entry)) is not None:
            with expected(f"the whole number {whole} for the option {name!r}"):
                made = rounds.kind(parse_options(kind, {**rounds.options, name: whole}))
            value = getattr(made.options, name)
            expect(type(value) is float, f"{name} = {whole} became {value!r}, not a float")


def _refused(rounds: Rounds, given: dict[str, Any], pointers: set[str]) -> None:
    try:
        rounds.kind(parse_options(rounds.kind.Options, {**rounds.options, **given}))
    except Invalid as refusal:
        found = {str(fault["pointer"]) for fault in refusal.data.get("errors", [])}
        wanted = {f"/options/{name}" for name in pointers}
        expect(wanted <= found, f"{given} was refused at {sorted(found)}, not at {sorted(wanted)}")
    except Exception as error:  # noqa: BLE001 - any other is what this looks for
        broken(f"{given} raised {type(error).__name__}: {error}; a wrong option is `Invalid`")
    else:
        broken(f"{given} was accepted")


def _beyond(entry: Mapping[str, Any]) -> list[Any]:
    """Values just outside what the schema allows."""
    found: list[Any] = ["\0"] if "enum" in entry else []
    if "array" in entry["type"] or "string" in entry["type"]:
        return found
    step = 1 if "integer" in entry["type"] else 1e-3
    found += [entry["minimum"] - step] if "minimum" in entry else []
    found += [entry["maximum"] + step] if "maximum" in entry else []
    return found + [entry[key] for key in ("exclusiveMinimum", "exclusiveMaximum") if key in entry]


def _whole(entry: Mapping[str, Any]) -> int | None:
    """A whole number that the schema allows, if there is one near."""
    for value in (1, 0, 2, 10):
        if all(
            (
                value >= entry.get("minimum", value),
                value > entry.get("exclusiveMinimum", value - 1),
                value <= entry.get("maximum", value),
                value < entry.get("exclusiveMaximum", value + 1),
            )
        ):
            return value
    return None


def check_hook(rounds: Rounds) -> None:
    """`check` answers None, `Refused` with a reason, or tensors that fit; always the same, changing nothing."""
    meta = UpdateMeta("somebody", 3, num_steps=3)
    for model in (random_model(1), {name: t * 0 for name, t in random_model(2).items()}):
        given = copy.deepcopy(model)
        with expected("check raised; to refuse an update it returns Refused(reason)"):
            first = rounds.new().check(meta, given)
            again = rounds.new().check(meta, copy.deepcopy(model))
        for name, tensor in model.items():
            expect(
                name in given and torch.equal(given[name], tensor),
                f"check changed the tensor {name!r} that it was given",
            )
        expect(_same(first, again), "check answered the same update differently")
        _check_answer(first, model)


def _check_answer(answer: object, model: Mapping[str, torch.Tensor]) -> None:
    if answer is None:
        return
    if isinstance(answer, Refused):
        expect(
            answer.reason.strip(), "check refused without a reason, and the participant reads it"
        )
        return
    expect(isinstance(answer, Mapping), f"check returned a {type(answer).__name__}")
    if not isinstance(answer, Mapping):
        return
    expect(set(answer) == set(model), "check returned other tensor names than it was given")
    for name, tensor in answer.items():
        fits = tensor.shape == model[name].shape and tensor.dtype == model[name].dtype
        expect(fits, f"check returned {name!r} with another shape or dtype")
        expect(torch.isfinite(tensor.double()).all(), f"check made NaN or infinity in {name!r}")


def _same(one: object, other: object) -> bool:
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    return one == other


def instances(rounds: Rounds) -> None:
    """What an instance learns is its own: nothing is kept on the class, and options stay as they are."""
    before = {name: repr(value) for name, value in _shared(rounds.kind).items()}
    options = json.dumps(rounds.new().options.__dict__, default=str)
    strategy = rounds.new()
    with expected("a plain round"):
        rounds.run(strategy=strategy)
    changed = [
        name for name, value in _shared(rounds.kind).items() if repr(value) != before.get(name)
    ]
    expect(
        not changed, f"a round changed {', '.join(changed)} on the class, which all rounds share"
    )
    expect(
        json.dumps(strategy.options.__dict__, default=str) == options, "a round changed the options"
    )


def _shared(kind: type[Strategy[Any]]) -> dict[str, Any]:
    return {
        name: value
        for base in kind.__mro__
        for name, value in vars(base).items()
        if not name.startswith("__") and not callable(value)
    }


CHECKS: dict[str, Callable[[Rounds], None]] = {
    "description": description,
    "bad options": bad_options,
    "check hook": check_hook,
    "instances": instances,
}
