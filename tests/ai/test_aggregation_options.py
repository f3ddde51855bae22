"""Options are taken exactly as declared, and every fault is named."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from fl_server_ai.aggregation.options import parse_options, schema
from fl_server_core.exceptions import Invalid


@dataclass(frozen=True)
class Options:
    """One of each kind."""

    rounds: int = field(metadata={"ge": 1, "doc": "How many."})
    rate: float = field(default=0.5, metadata={"gt": 0.0, "lt": 1.0})
    fast: bool = False
    kind: str = field(default="a", metadata={"choices": ("a", "b")})
    limit: float | None = field(default=None, metadata={"le": 9})
    names: list[str] = field(default_factory=list)


def test_what_is_left_out_gets_its_default() -> None:
    assert parse_options(Options, {"rounds": 3}) == Options(rounds=3)


def test_an_int_will_do_for_a_float() -> None:
    got = parse_options(Options, {"rounds": 1, "limit": 2, "names": ["x"], "fast": True})

    assert type(got.limit) is float
    assert got == Options(rounds=1, limit=2.0, names=["x"], fast=True)


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        ("rounds", True, "type"),
        ("rounds", 1.0, "type"),
        ("rounds", 0, "range"),
        ("rate", "0.5", "type"),
        ("rate", float("nan"), "type"),
        ("rate", float("inf"), "type"),
        ("rate", 10**400, "type"),
        ("rate", 0, "range"),
        ("rate", 1, "range"),
        ("rate", None, "type"),
        ("fast", 1, "type"),
        ("kind", "c", "choice"),
        ("limit", 9.5, "range"),
        ("names", "x", "type"),
        ("names", [1], "type"),
        ("x/y~z", 1, "unknown"),
    ],
)
def test_a_fault_is_named_by_pointer_and_code(name: str, value: Any, code: str) -> None:
    with pytest.raises(Invalid) as refusal:
        parse_options(Options, {"rounds": 1} | {name: value}, pointer="/training/options")

    pointer = f"/training/options/{name.replace('~', '~0').replace('/', '~1')}"
    assert refusal.value.error_code == "BAD_OPTION"
    assert [(fault["pointer"], fault["code"]) for fault in refusal.value.data["errors"]] == [
        (pointer, code)
    ]


def test_all_faults_are_named_at_once() -> None:
    with pytest.raises(Invalid) as refusal:
        parse_options(Options, {"rate": 2.0, "other": 1})

    faults = {(fault["pointer"], fault["code"]) for fault in refusal.value.data["errors"]}
    assert faults == {
        ("/options/rounds", "required"),
        ("/options/rate", "range"),
        ("/options/other", "unknown"),
    }


def test_the_schema_says_the_same() -> None:
    assert schema(Options) == {
        "type": "object",
        "additionalProperties": False,
        "required": ["rounds"],
        "properties": {
            "rounds": {"type": "integer", "minimum": 1, "description": "How many."},
            "rate": {
                "type": "number",
                "exclusiveMinimum": 0.0,
                "exclusiveMaximum": 1.0,
                "default": 0.5,
            },
            "fast": {"type": "boolean", "default": False},
            "kind": {"type": "string", "enum": ["a", "b"], "default": "a"},
            "limit": {"type": ["number", "null"], "maximum": 9, "default": None},
            "names": {"type": "array", "items": {"type": "string"}, "default": []},
        },
    }
