"""What every uncertainty method promises, and how options are told and refused."""

import json
import re
import subprocess
import sys
from typing import Any

import pytest

from fl_server_ai.uncertainty import UNCERTAINTY, DrawPlan, Kind
from fl_server_ai.uncertainty.options import (
    CommonOptions,
    merge_options,
    parse_options,
    schema,
)
from fl_server_ai.uncertainty.seeds import stream_key
from fl_server_core.exceptions import Invalid

NAMES = list(UNCERTAINTY)
WIRE = {"N": 10, "softmax": False}


def pointers(refusal: pytest.ExceptionInfo[Invalid]) -> list[str]:
    return [
        fault["pointer"].removeprefix("/options/uncertainty/")
        for fault in refusal.value.data["errors"]
    ]


def test_the_four_methods_of_the_contract_are_there() -> None:
    assert {"NONE", "ENSEMBLE", "MC_DROPOUT", "SWAG"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_each_method_takes_the_options_of_the_contract(name: str) -> None:
    options = parse_options(UNCERTAINTY[name].Options, WIRE)

    assert (options.N, options.softmax, options.seed) == (10, False, 0)


@pytest.mark.parametrize("name", NAMES)
def test_the_schema_is_json_and_its_defaults_are_valid(name: str) -> None:
    cls = UNCERTAINTY[name].Options

    described = json.loads(json.dumps(schema(cls)))

    given = {key: entry["default"] for key, entry in described["properties"].items()}
    assert parse_options(cls, given) == cls()
    assert all("description" in entry for entry in described["properties"].values())
    assert described["properties"]["quantiles"]["items"]["type"] == "number"
    assert cls.__dataclass_params__.frozen  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "NONE"])
def test_a_method_says_where_it_comes_from(name: str) -> None:
    assert re.fullmatch(r"\d{4}\.\d{4,5}", UNCERTAINTY[name].paper)


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("NONE", DrawPlan(Kind.PLAIN, 1, 3)),
        ("ENSEMBLE", DrawPlan(Kind.MEMBERS, None, 3)),
        ("MC_DROPOUT", DrawPlan(Kind.DROPOUT, 7, 3)),
        ("SWAG", DrawPlan(Kind.WEIGHTS, 7, 3)),
    ],
)
def test_a_method_plans_its_draws(name: str, plan: DrawPlan) -> None:
    kind = UNCERTAINTY[name]

    assert kind(parse_options(kind.Options, {"N": 7, "seed": 3})).plan() == plan


def test_every_draw_of_every_seed_has_its_own_torch_seed() -> None:
    seeds = {
        DrawPlan(Kind.DROPOUT, 50, seed).torch_seed(k) for seed in range(20) for k in range(50)
    }

    assert len(seeds) == 1000
    assert max(seeds) < 2**63
    assert stream_key(1, 11, "a") != stream_key(11, 1, "a")


@pytest.mark.parametrize(
    ("bad", "where"),
    [
        ({"N": 0}, ["N"]),
        ({"N": 1001}, ["N"]),
        ({"N": True}, ["N"]),
        ({"seed": -1}, ["seed"]),
        ({"task": "clustering"}, ["task"]),
        ({"output": "softmax"}, ["output"]),
        ({"softmax": True, "output": "probs"}, ["softmax"]),
        ({"softmax": True, "task": "regression"}, ["softmax"]),
        ({"output": "logits", "task": "regression"}, ["output"]),
        ({"quantiles": [0.5, 1.5]}, ["quantiles"]),
        ({"quantiles": [float("nan")]}, ["quantiles"]),
        ({"quantiles": ["0.5"]}, ["quantiles"]),
        ({"quantiles": 0.5}, ["quantiles"]),
        ({"quantiles": [k / 200 for k in range(200)]}, ["quantiles"]),
        ({"scale": 1.0, "quantiles": None, "seed": 0.5}, ["scale", "seed", "quantiles"]),
    ],
)
def test_bad_options_are_refused_by_pointer(bad: dict[str, Any], where: list[str]) -> None:
    with pytest.raises(Invalid) as refusal:
        parse_options(CommonOptions, bad)

    assert refusal.value.error_code == "BAD_OPTION"
    assert pointers(refusal) == where


def test_a_request_changes_the_method_and_keeps_what_the_training_says() -> None:
    training = {"N": 30, "scale": 0.5, "output": "probs"}

    swag = merge_options(UNCERTAINTY["SWAG"].Options, training, {"seed": 5})
    dropout = merge_options(UNCERTAINTY["MC_DROPOUT"].Options, training, {"softmax": True})
    numbers = merge_options(UNCERTAINTY["NONE"].Options, training, {"task": "regression"})

    assert (swag.N, swag.scale, swag.output, swag.seed) == (30, 0.5, "probs", 5)  # type: ignore[attr-defined]
    assert (dropout.N, dropout.output, dropout.softmax) == (30, None, True)
    assert numbers.output is None


def test_a_request_is_not_forgiven_options_of_another_method() -> None:
    with pytest.raises(Invalid) as refusal:
        merge_options(UNCERTAINTY["MC_DROPOUT"].Options, {"scale": 0.5}, {"scale": 2.0})

    assert pointers(refusal) == ["scale"]


def test_methods_options_and_pictures_load_without_torch() -> None:
    code = """
import sys
from fl_server_ai.uncertainty import UNCERTAINTY, options, pictures, seeds
assert list(UNCERTAINTY)
assert "torch" not in sys.modules
"""

    subprocess.run([sys.executable, "-c", code], check=True)
