"""The promises that every registered strategy keeps."""

import json
import re
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fl_server_ai.aggregation import STRATEGIES, UpdateMeta
from fl_server_ai.aggregation.engine import UpdateFile, aggregate
from fl_server_ai.aggregation.options import parse_options, schema
from fl_server_core.exceptions import Invalid
from tests.ai.strategy_files import furnished

NAMES = list(STRATEGIES)
N = 7


def model(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "w": torch.randn(50, 3, generator=generator),
        "h": torch.randn(17, generator=generator).bfloat16(),
        "count": torch.randint(0, 100, (4,), generator=generator),
    }


@pytest.fixture
def files(tmp_path: Path) -> list[UpdateFile]:
    updates = []
    for index in range(N):
        save_file(model(index), tmp_path / f"{index}")
        updates.append(UpdateFile(tmp_path / f"{index}", UpdateMeta(str(index), index + 1)))
    save_file(model(99), tmp_path / "base")
    return updates


def run(name: str, updates: list[UpdateFile], folder: Path, threads: int = 2) -> bytes:
    strategy = STRATEGIES[name]()
    aggregate(
        base=folder / "base",
        updates=furnished(strategy, updates, folder),
        out=folder / "out",
        strategy=strategy,
        state_out=folder / "state",
        block=32,
        threads=threads,
    )
    return (folder / "out").read_bytes()


def test_the_strategies_of_the_first_version_are_there() -> None:
    assert {"FedAvg", "FedProx"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_arrival_does_not_matter(
    name: str, files: list[UpdateFile], tmp_path: Path
) -> None:
    assert run(name, files, tmp_path) == run(name, files[::-1], tmp_path, threads=1)


@pytest.mark.parametrize("name", [n for n in NAMES if STRATEGIES[n].takes == "weights"])
def test_clients_that_did_not_move_leave_the_model_as_it_is(
    name: str, files: list[UpdateFile], tmp_path: Path
) -> None:
    still = [UpdateFile(tmp_path / "base", file.meta) for file in files]

    assert run(name, still, tmp_path) == (tmp_path / "base").read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_bad_options_are_refused_by_pointer(name: str) -> None:
    options = STRATEGIES[name].Options
    bad = {"no_such_option": 1} | {field.name: object() for field in fields(options)}

    with pytest.raises(Invalid) as refusal:
        parse_options(options, bad)

    pointers = {fault["pointer"] for fault in refusal.value.data["errors"]}
    assert pointers == {f"/options/{key}" for key in bad}


@pytest.mark.parametrize("name", NAMES)
def test_the_schema_is_json_and_its_defaults_are_valid(name: str) -> None:
    kind = STRATEGIES[name]

    described = json.loads(json.dumps(schema(kind.Options)))

    given = {
        key: entry["default"]
        for key, entry in described["properties"].items()
        if "default" in entry
    }
    assert parse_options(kind.Options, given) == kind.Options(**given)
    assert all("description" in entry for entry in described["properties"].values())


@pytest.mark.parametrize("name", NAMES)
def test_a_strategy_says_where_it_comes_from(name: str) -> None:
    kind = STRATEGIES[name]

    assert re.fullmatch(r"\d{4}\.\d{4,5}|https://\S+", kind.paper)
    assert is_dataclass(kind.Options)
    assert kind.Options.__dataclass_params__.frozen
    assert json.loads(json.dumps(kind().client_config())) == kind().client_config()


def test_fedprox_tells_its_clients_mu() -> None:
    kind = STRATEGIES["FedProx"]

    assert kind(parse_options(kind.Options, {"mu": 1})).client_config() == {"mu": 1.0}
    with pytest.raises(Invalid):
        parse_options(kind.Options, {"mu": -0.1})


def test_strategies_load_without_torch() -> None:
    code = (
        "import sys; from fl_server_ai.aggregation import STRATEGIES, options; list(STRATEGIES); "
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )

    done = subprocess.run([sys.executable, "-c", code], check=False)

    assert done.returncode == 0
