"""Pipelines: checked with pointers, one canonical form, and torchvision's own transforms translated without running them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fl_server_ai.containers import Limits
from fl_server_ai.containers.torch_archive.calls import HostilePickle
from fl_server_ai.preprocessing.pipeline import (
    canonical_text,
    document_of,
    parse,
    parse_text,
    pipeline_schema,
)
from fl_server_ai.preprocessing.reading import read_pipeline
from fl_server_ai.preprocessing.steps import STEPS
from fl_server_ai.sandbox.image_steps import carried_out
from fl_server_core.exceptions import Invalid, TooLarge, UnknownContainer
from tests.ai.hostile import building as b

MADE = Path(__file__).parent / "transforms"  # by torchvision: see make.py there
TRANSLATED = ("usual", "sequential", "nested", "preset", "bytes")
USUAL = [
    {"step": "to_image"},
    {"step": "resize", "antialias": True, "interpolation": "bilinear", "max_size": None, "size": [12]},
    {"step": "center_crop", "size": [8, 8]},
    {"step": "cast", "dtype": "float32", "scale": True},
    {"step": "normalize", "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
]  # fmt: skip


def faults(*steps: Any, **beside: Any) -> list[tuple[str, str]]:
    with pytest.raises(Invalid) as caught:
        parse({"steps": list(steps), **beside})
    assert caught.value.error_code == "BAD_PREPROCESSING"
    return [(error["pointer"], error["code"]) for error in caught.value.data["errors"]]


def read(path: Path) -> Any:
    return read_pipeline(path, Limits())


@pytest.mark.parametrize(
    ("step", "pointer", "code"),
    [
        ({"step": "blur"}, "step", "unknown"),
        ({"size": 3}, "step", "required"),
        ("resize", "step", "required"),
        ({"step": "resize"}, "size", "required"),
        ({"step": "resize", "size": 0}, "size", "range"),
        ({"step": "resize", "size": True}, "size", "type"),
        ({"step": "resize", "size": [1, 2, 3]}, "size", "length"),
        ({"step": "resize", "size": [8, 20_000]}, "size", "range"),
        ({"step": "resize", "size": [8, 8], "max_size": 9}, "max_size", "contradiction"),
        ({"step": "resize", "size": 8, "max_size": 8}, "max_size", "range"),
        ({"step": "resize", "size": 8, "interpolation": "lanczos"}, "interpolation", "choice"),
        ({"step": "resize", "size": 8, "anti_alias": True}, "anti_alias", "unknown"),
        ({"step": "grayscale", "channels": 2}, "channels", "choice"),
        ({"step": "cast", "dtype": "complex64"}, "dtype", "choice"),
        ({"step": "cast", "dtype": "int64", "scale": True}, "scale", "contradiction"),
        ({"step": "normalize", "mean": [0.5], "std": [0.0]}, "std/0", "range"),
        ({"step": "normalize", "mean": [0.5], "std": [1, 1]}, "std", "length"),
        ({"step": "normalize", "mean": [], "std": []}, "mean", "length"),
        ({"step": "normalize", "mean": ["a"], "std": [1]}, "mean", "type"),
        ({"step": "crop", "top": -1, "left": 0, "height": 2, "width": 2}, "top", "range"),
    ],
)
def test_each_fault_of_a_step_has_a_pointer(step: Any, pointer: str, code: str) -> None:
    assert (f"/steps/1/{pointer}", code) in faults({"step": "rgb"}, step)


def test_all_faults_are_told_at_once() -> None:
    found = faults(
        {"step": "flatten"}, {"step": "normalize", "mean": [0], "std": [0]}, {"step": "x"}, other=1
    )

    assert found == [
        ("/other", "unknown"), ("/steps/0", "order"), ("/steps/1/std/0", "range"), ("/steps/2/step", "unknown"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text", [b'{"steps": [NaN]}', b'{"steps": [], "steps": []}', b"[" * 100_000, b"[]", b'{"steps": {}}',
             b'{"steps": [' + b'{"step": "rgb"},' * 64 + b'{"step": "rgb"}]}', b'{"steps": []' + b" " * 2**18 + b"}"],
)  # fmt: skip
def test_a_text_that_is_no_pipeline_is_refused(text: bytes) -> None:
    with pytest.raises(Invalid) as caught:
        parse_text(text)

    assert caught.value.error_code == "BAD_PREPROCESSING"


def test_the_canonical_text_is_the_same_for_the_same_pipeline_and_reads_as_itself() -> None:
    short = parse_text(b'{"steps": [{"size": 12, "step": "resize"}]}')
    long = parse({"steps": [{"step": "resize", "antialias": True, "max_size": None, "size": 12}]})

    text = canonical_text(short)

    assert text == canonical_text(long)
    assert text.startswith(b'{"steps":[{"step":"resize",')
    assert parse_text(text) == short == parse(document_of(short))


def test_every_step_is_in_the_schema() -> None:
    entries = pipeline_schema()["properties"]["steps"]["items"]["oneOf"]

    assert [entry["properties"]["step"]["const"] for entry in entries] == list(STEPS)


@pytest.mark.parametrize("name", ["usual.pt", "usual.pickle"])
def test_torchvisions_compose_becomes_the_same_steps(name: str) -> None:
    assert json.loads(canonical_text(read(MADE / name))) == {"steps": USUAL}


@pytest.mark.parametrize("name", TRANSLATED)
def test_a_translated_pipeline_gives_what_torchvision_gave(name: str) -> None:
    outputs = load_file(MADE / "outputs.safetensors")

    found = carried_out(read(MADE / f"{name}.pt"), outputs["image"])

    assert found.shape[0] == 1
    assert found.dtype == outputs[name].dtype
    # torchvision resizes uint8 in integers on some processors: one step of 255 beside, in units of std.
    beside = 1.01 / 255 / 0.22 if name in ("usual", "preset") else 1e-6
    torch.testing.assert_close(found[0], outputs[name], rtol=0, atol=beside)


@pytest.mark.parametrize("name", ["v1.pt", "v1.pickle"])
def test_old_transforms_are_refused_with_what_to_do(name: str) -> None:
    with pytest.raises(Invalid, match=r"torchvision\.transforms\.v2.*\"steps\"") as caught:
        read(MADE / name)

    assert caught.value.error_code == "TRANSFORMS_V1"


def test_unknown_transforms_are_named() -> None:
    with pytest.raises(Invalid, match=r"RandomHorizontalFlip .* CenterCrop") as caught:
        read(MADE / "random.pt")

    assert caught.value.error_code == "UNKNOWN_TRANSFORM"
    assert caught.value.data["errors"][0]["pointer"] == "/transforms/1"


def test_a_std_of_zero_is_refused_in_a_pickle_too() -> None:
    with pytest.raises(Invalid) as caught:
        read(MADE / "std_zero.pt")

    assert caught.value.data["errors"][0]["pointer"] == "/steps/1/std/1"


V2 = "torchvision.transforms.v2."
COMPOSE = f"{V2}_container.Compose"


def _object(path: str, state: bytes) -> bytes:
    module, _, name = path.rpartition(".")
    return b.path(module, name) + b")\x81" + state + b"b"


def _compose(*members: bytes) -> bytes:
    return _object(COMPOSE, b.named({"transforms": b.listed(*members)}))


EVIL = b.call(b.path("os", "system"), b.text("touch /tmp/pwned"))
TO_IMAGE = _object(f"{V2}_type_conversion.ToImage", b"}")


def _written(folder: Path, program: bytes) -> Path:
    path = folder / "p.pickle"
    path.write_bytes(b.program(program))
    return path


def test_an_honest_pickle_of_our_own_making_is_translated(tmp_path: Path) -> None:
    path = _written(tmp_path, _compose(TO_IMAGE, _compose(TO_IMAGE)))

    assert canonical_text(read(path)) == b'{"steps":[{"step":"to_image"},{"step":"to_image"}]}'


def test_a_call_beside_the_transforms_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HostilePickle, match="system"):
        read(_written(tmp_path, _compose(TO_IMAGE, EVIL)))


@pytest.mark.parametrize(
    ("program", "code"),
    [
        (_compose(*[TO_IMAGE] * 65), "UNKNOWN_TRANSFORM"),
        (_compose(b.text("rgb")), "UNKNOWN_TRANSFORM"),
        (_object(COMPOSE, b.named({"transforms": b.number(3)})), "UNKNOWN_TRANSFORM"),
        (_object(f"{V2}_geometry.Resize", b.named({"size": TO_IMAGE})), "BAD_PREPROCESSING"),
        (_object(f"{V2}_geometry.Resize", b"}"), "BAD_PREPROCESSING"),
        (_object(f"{V2}_misc.ToDtype", b.named({"dtype": b.text("float32")})), "UNKNOWN_TRANSFORM"),
    ],
    ids=["too many", "a text", "no list", "an object as size", "nothing", "a text as dtype"],
)
def test_what_torch_never_writes_is_refused(tmp_path: Path, program: bytes, code: str) -> None:
    with pytest.raises(Invalid) as caught:
        read(_written(tmp_path, program))

    assert caught.value.error_code == code


def test_repeated_nesting_ends(tmp_path: Path) -> None:
    inner = b.put(_compose(), 1)
    for index in range(2, 12):
        inner = b.put(_compose(inner, *[b.get(index - 1)] * 60), index)

    with pytest.raises(Invalid, match="more than"):
        read(_written(tmp_path, inner))


def test_a_deep_nest_ends(tmp_path: Path) -> None:
    opened = (
        b.path("torch.nn.modules.container", "Sequential") + b")\x81" + b"}(" + b.text("_modules")
    )
    program = (opened + b"}(" + b.text("0")) * 5000 + TO_IMAGE + b"uub" * 5000

    with pytest.raises(UnknownContainer):
        read(_written(tmp_path, program))


def test_a_pickle_of_something_else_and_a_large_one_are_refused(tmp_path: Path) -> None:
    other = _written(tmp_path, b.named({"a": b.number(1)}))

    with pytest.raises(UnknownContainer, match="JSON pipeline"):
        read(other)
    with pytest.raises(TooLarge):
        read_pipeline(other, Limits(pickle_bytes=4))


def test_other_files_are_left_to_others(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save({"mean": torch.zeros(3)}, path)

    assert read(path) is None
