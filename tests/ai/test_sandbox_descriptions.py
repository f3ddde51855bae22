"""What a child says of a program's layers is not taken at its word."""

import json
from typing import Any

import pytest

from fl_server_ai.sandbox.descriptions import parsed_description
from fl_server_ai.sandbox.errors import SandboxCrashed

LAYER = {
    "path": "", "class": "Net", "params": 3, "trainable": 3, "bytes": 12, "shared": 0, "input": None,
    "output": [1, 3], "kernel": None, "macs": None, "size": 12, "ran": True,
}  # fmt: skip
TOLD = {
    "layers": [LAYER], "params": 3, "trainable": 3, "bytes": 12, "ran": "F32", "failed": None,
    "output": 12, "macs": 0,
}  # fmt: skip


def test_what_an_honest_child_says_is_understood() -> None:
    found = parsed_description(json.dumps(TOLD).encode())

    assert (found.counted, found.ran, found.layers[0].output) == ((3, 3, 12), "F32", (1, 3))


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": "Net"},
        {"layers": [[]]},
        {"layers": [{**LAYER, "params": -1}]},
        {"layers": [{**LAYER, "params": 2**63}]},
        {"layers": [{**LAYER, "params": True}]},
        {"layers": [{**LAYER, "output": [[1]]}]},
        {"layers": [{**LAYER, "output": [1] * 65}]},
        {"layers": [{**LAYER, "path": "a" * 513}]},
        {"layers": [{}]},
        {"macs": 0.5},
        {"ran": 7},
        {"output": None},
    ],
)
def test_nonsense_is_a_crash_of_the_child(changes: dict[str, Any]) -> None:
    with pytest.raises(SandboxCrashed):
        parsed_description(json.dumps({**TOLD, **changes}).encode())


@pytest.mark.parametrize("raw", [b"", b"[]", b"[" * 100_000, b"\xff", b"{}"])
def test_what_is_no_description_is_a_crash_too(raw: bytes) -> None:
    with pytest.raises(SandboxCrashed):
        parsed_description(raw)


def test_texts_keep_nothing_that_nobody_can_see() -> None:
    told = {**TOLD, "layers": [{**LAYER, "class": "N\x1b[31met\n"}]}

    found = parsed_description(json.dumps(told).encode())

    assert found.layers[0].kind == "N?[31met?"
