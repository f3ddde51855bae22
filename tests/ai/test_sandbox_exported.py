"""The static check of .pt2 archives: nothing that torch would unpickle, look up or evaluate gets to it."""

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fl_server_ai.containers.limits import Limits
from fl_server_ai.containers.torch_archive.exports import MODEL, PickledEntry
from fl_server_ai.containers.torch_archive.scripts import ForbiddenOperator
from fl_server_ai.sandbox.exported import check_exported
from fl_server_ai.sandbox.exported_loading import load_exported
from fl_server_core.exceptions import BadContainer

CONFIG = "data/weights/model_weights_config.json"


class Touch:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def exported(path: Path, module: nn.Module | None = None, shape: tuple[int, ...] = (2, 3)) -> Path:
    """A program with a free first dimension."""
    module = module or nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Dropout(), nn.Linear(4, 2))
    free = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(module.eval(), (torch.zeros(shape),), dynamic_shapes=free)
    torch.export.save(program, path)
    return path


def edited(path: Path, entry: str, change: Callable[[bytes], bytes]) -> Path:
    """The archive with one entry changed, or added."""
    with zipfile.ZipFile(path) as old:
        entries = {name: old.read(name) for name in old.namelist()}
    name = f"{next(iter(entries)).split('/')[0]}/{entry}"
    entries[name] = change(entries.get(name, b""))
    with zipfile.ZipFile(path, "w") as new:
        for name, data in entries.items():
            new.writestr(name, data)
    return path


def replaced(path: Path, old: str, new: str, entry: str = MODEL) -> Path:
    def change(data: bytes) -> bytes:
        assert old.encode() in data
        return data.replace(old.encode(), new.encode())

    return edited(path, entry, change)


class Shapes(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        half = x[:, : x.shape[0] // 2 + 1]
        return half.reshape(-1, 1), torch.zeros(x.shape[0] * 2, x.shape[0] % 3 + 1)


@pytest.mark.parametrize(
    "make",
    [
        lambda: None,
        lambda: nn.Sequential(nn.Unflatten(1, (1, 1, 3)), nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)),
        lambda: nn.TransformerEncoderLayer(3, 1, 8),
        Shapes,
    ],
)
def test_what_torch_export_saves_is_accepted(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    path = exported(tmp_path / "m.pt2", make(), (5, 3))

    check_exported(path, Limits())


@pytest.mark.parametrize(
    "entry",
    [
        "data/weights/model.pt",
        "data/constants/model.pt",
        "data/constants/custom_obj_0",
        "data/constants/opaque_obj_0",
        "data/aotinductor/model/code.so",
        "models/other.json",
        "serialized_state_dict.pt",
        "data.pkl",
        "data/weights/weight_0/../../x",
    ],
)
def test_entries_that_torch_would_unpickle_or_run_are_refused(entry: str, tmp_path: Path) -> None:
    hostile = pickle.dumps(Touch(tmp_path / "touched"))
    path = edited(exported(tmp_path / "m.pt2"), entry, lambda _: hostile)

    with pytest.raises(BadContainer) as caught:
        check_exported(path, Limits())

    assert caught.value.error_code in {"PICKLED_ENTRY", "BAD_CONTAINER"}
    assert not (tmp_path / "touched").exists()


def test_weights_that_say_use_pickle_are_refused(tmp_path: Path) -> None:
    path = replaced(
        exported(tmp_path / "m.pt2"), '"use_pickle": false', '"use_pickle": true', CONFIG
    )

    with pytest.raises(PickledEntry, match="use_pickle"):
        check_exported(path, Limits())


@pytest.mark.parametrize("name", ["custom_obj_0", "opaque_obj_0", "../models/model.json"])
def test_constants_that_are_objects_are_refused(name: str, tmp_path: Path) -> None:
    path = replaced(exported(tmp_path / "m.pt2"), '"weight_0"', f'"{name}"', CONFIG)

    with pytest.raises(PickledEntry):
        check_exported(path, Limits())


@pytest.mark.parametrize(
    "target",
    [
        "torch.ops.aten.from_file.default",
        "torch.ops.aten.linear.default.__init__.__globals__",
        "torch.load",
        "torch.hub.load",
        "torch.os.system",
        "_operator.attrgetter",
        "math.factorial",
        "torch.ops.load_library",
        "torch.ops.inductor._reinterpret_tensor.default",
        "#extension:x",
        "anything",
    ],
)
def test_operators_that_are_not_listed_are_named(target: str, tmp_path: Path) -> None:
    path = replaced(exported(tmp_path / "m.pt2"), "torch.ops.aten.linear.default", target)

    with pytest.raises(ForbiddenOperator) as caught:
        check_exported(path, Limits())

    assert caught.value.data["operator"] == target


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os').system('id')",
        "Symbol('s1').__class__",
        "().__class__",
        "Symbol('x y')",
        "lambda: 0",
        "s0.func",
        "exec",
        "Integer('1')",
        "s0; s1",
        "[s0]",
        "",
        7,
    ],
)
def test_expressions_that_do_more_than_calculate_are_refused(
    expression: object, tmp_path: Path
) -> None:
    def change(data: bytes) -> bytes:
        model = json.loads(data)
        model["graph_module"]["more"] = [{"as_expr": {"expr_str": expression}}]
        return json.dumps(model).encode()

    path = edited(exported(tmp_path / "m.pt2"), MODEL, change)

    with pytest.raises(BadContainer, match="expression"):
        check_exported(path, Limits())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (
            "in_spec",
            '[1, {"type": "collections.defaultdict", "context": "x", "children_spec": []}]',
        ),
        ("in_spec", "no json"),
        ("name", "a b(); import os"),
        ("as_custom_obj", {"name": "a", "class_fqn": "b"}),
    ],
)
def test_names_and_trees_that_python_would_look_up_are_refused(
    key: str, value: object, tmp_path: Path
) -> None:
    def change(data: bytes) -> bytes:
        model = json.loads(data)
        model["graph_module"]["more"] = {key: value}
        return json.dumps(model).encode()

    path = edited(exported(tmp_path / "m.pt2"), MODEL, change)

    with pytest.raises(BadContainer):
        check_exported(path, Limits())


@pytest.mark.parametrize("text", ["[" * 100_000, "{", '{"graph_module": ' * 200 + "1" + "}" * 200])
def test_json_that_is_damaged_or_deep_is_refused(text: str, tmp_path: Path) -> None:
    path = edited(exported(tmp_path / "m.pt2"), MODEL, lambda _: text.encode())

    with pytest.raises(BadContainer):
        check_exported(path, Limits())


def test_sample_inputs_and_guards_never_reach_torch(tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    module = nn.Sequential(nn.Linear(3, 2))
    path = exported(tmp_path / "m.pt2", module)
    saved = io.BytesIO()
    torch.save((Touch(touched),), saved)
    edited(path, "data/sample_inputs/model.pt", lambda _: saved.getvalue())

    def change(data: bytes) -> bytes:
        model = json.loads(data)
        model["guards_code"] = [f"__import__('pathlib').Path({str(touched)!r}).touch()"]
        return json.dumps(model).encode()

    edited(path, MODEL, change)

    check_exported(path, Limits())
    with path.open("rb") as file:
        model = load_exported(file, "cpu")

    assert torch.equal(model.run((torch.ones(4, 3),)), module(torch.ones(4, 3)))
    assert not touched.exists()
