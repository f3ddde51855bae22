"""Programs of torch.export as containers: their state dict is read without torch and written back for torch."""

import json
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from fl_server_ai.containers import extract, sniff, template_ties, write_back
from fl_server_ai.containers.torch_archive.exports import CONSTANTS, MODEL, WEIGHTS
from fl_server_core.exceptions import DomainError
from tests.ai.test_sandbox_exported import edited
from tests.ai.torch_files import bits


class Net(nn.Module):
    """Ties, BatchNorm, unused and frozen parameters, empty tensors, and state that is no weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.last = self.first
        self.unused = nn.Parameter(torch.ones(2))
        self.frozen = nn.Parameter(torch.rand(1, 4), requires_grad=False)
        self.register_buffer("empty", torch.zeros(0, 3))
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("scratch", torch.rand(4), persistent=False)
        self.constant = torch.full((4,), 2.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.norm(self.first(x))) + self.frozen + self.count
        return x * self.scratch + self.constant + torch.tensor([1.0, 2.0, 3.0, 4.0])


class Views(nn.Module):
    """Weights that are part of larger storages, and not in C order."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Parameter(torch.arange(12.0).reshape(3, 4)[1:])
        self.turned = nn.Parameter(torch.arange(8.0).reshape(4, 2).t())

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.part.t() + (x @ self.turned.t())


class Overlapping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        base = torch.arange(12.0).reshape(3, 4)
        self.a, self.b = nn.Parameter(base[:2]), nn.Parameter(base[1:])

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.a.t() + self.b.sum()


def image() -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 2, 2), nn.Flatten()).to(
        memory_format=torch.channels_last
    )


def exported(path: Path, module: nn.Module, dtype: torch.dtype = torch.float32) -> Any:
    free = ({0: torch.export.Dim.DYNAMIC},)
    example = (torch.ones(2, 4, dtype=dtype),)
    program = torch.export.export(module.eval(), example, dynamic_shapes=free)
    with warnings.catch_warnings(action="ignore"):
        torch.export.save(program, path)
    return program


def read(path: Path) -> dict[str, Tensor]:
    target = path.with_suffix(".safetensors")
    extract(path, target)
    state = safetensors.torch.load_file(target)
    target.unlink()
    return state


def rewritten(path: Path, state: Mapping[str, Tensor]) -> Path:
    raw, weights, out = (path.with_suffix(end) for end in (".raw", ".new", ".back.pt2"))
    raw.write_bytes(safetensors.torch.save({n: t.clone().contiguous() for n, t in state.items()}))
    extract(raw, weights)
    raw.unlink(missing_ok=True)
    write_back("torch_export", weights, out, path)
    weights.unlink()
    return out


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert {n: bits(t) for n, t in found.items()} == {n: bits(t) for n, t in expected.items()}


MODULES: dict[str, tuple[Callable[[], nn.Module], torch.dtype]] = {
    "one with everything": (Net, torch.float32),
    "views": (Views, torch.float32),
    "channels last": (image, torch.float32),
    "bfloat16": (lambda: nn.Linear(4, 2).bfloat16(), torch.bfloat16),
    "float64": (lambda: nn.Linear(4, 2).double(), torch.float64),
}


@pytest.mark.parametrize("name", MODULES)
def test_the_state_dict_is_read_and_written_back_as_torch_reads_it(
    tmp_path: Path, name: str
) -> None:
    make, dtype = MODULES[name]
    torch.manual_seed(1)
    program = exported(tmp_path / "net.pt2", make(), dtype)
    new = {
        key: (tensor + 1 if tensor.is_floating_point() else tensor + 2)
        for key, tensor in program.state_dict.items()
    }

    assert sniff(tmp_path / "net.pt2") == "torch_export"
    same(read(tmp_path / "net.pt2"), program.state_dict)
    back = rewritten(tmp_path / "net.pt2", new)
    loaded = torch.export.load(back)

    same(loaded.state_dict, new)
    same(loaded.constants, program.constants)
    assert back.stat().st_size == (tmp_path / "net.pt2").stat().st_size
    inputs = torch.rand(5, 4).to(dtype)
    with torch.no_grad():
        for key, tensor in program.state_dict.items():
            tensor.copy_(new[key])
        expected = program.module()(inputs)
        assert torch.equal(loaded.module()(inputs), expected)


def test_ties_are_told_and_constants_are_no_weights(tmp_path: Path) -> None:
    exported(tmp_path / "net.pt2", Net())

    ties = template_ties("torch_export", tmp_path / "net.pt2")
    names = set(read(tmp_path / "net.pt2"))

    assert ties == (("first.weight", "last.weight"), ("first.bias", "last.bias"))
    assert names == set(Net().state_dict())
    assert not names & {"scratch", "constant"}


def test_the_same_weights_give_the_same_file(tmp_path: Path) -> None:
    program = exported(tmp_path / "net.pt2", Net())

    back = rewritten(tmp_path / "net.pt2", program.state_dict)

    assert back.read_bytes() == (tmp_path / "net.pt2").read_bytes()


def test_tensors_that_overlap_are_read_but_cannot_be_a_model(tmp_path: Path) -> None:
    program = exported(tmp_path / "net.pt2", Overlapping())

    same(read(tmp_path / "net.pt2"), program.state_dict)
    with pytest.raises(DomainError) as refusal:
        template_ties("torch_export", tmp_path / "net.pt2")

    assert refusal.value.error_code == "OVERLAPPING_TENSORS"


def described(
    change: Callable[[dict[str, Any]], None], table: str = WEIGHTS, name: str = ""
) -> Any:
    """An edit of a table of tensors: the description of the one with this name, or of the first."""

    def edit(data: bytes) -> bytes:
        config = json.loads(data)
        change(config["config"][name] if name else next(iter(config["config"].values())))
        return json.dumps(config).encode()

    return table, edit


def meta(**values: Any) -> Any:
    return described(lambda payload: payload["tensor_meta"].update(values))


def text(old: str, new: str, table: str = WEIGHTS) -> Any:
    return table, lambda data: data.replace(old.encode(), new.encode(), 1)


LIES: dict[str, tuple[tuple[str, Callable[[bytes], bytes]], str]] = {
    "a pickle": (described(lambda p: p.update(use_pickle=True)), "PICKLED_ENTRY"),
    "a constant that is a pickle": (
        described(lambda p: p.update(use_pickle=True), CONSTANTS), "PICKLED_ENTRY",
    ),
    "use_pickle as a number": (described(lambda p: p.update(use_pickle=0)), "PICKLED_ENTRY"),
    "an object": (described(lambda p: p.update(path_name="custom_obj_0")), "PICKLED_ENTRY"),
    "a way out": (described(lambda p: p.update(path_name="../models/model.json")), "PICKLED_ENTRY"),
    "no such entry": (described(lambda p: p.update(path_name="weight_999")), "BAD_CONTAINER"),
    "no metadata": (described(lambda p: p.update(tensor_meta=None)), "BAD_CONTAINER"),
    "another member": (described(lambda p: p.update(more=1)), "BAD_CONTAINER"),
    "a larger shape": (meta(sizes=[{"as_int": 4}, {"as_int": 5}]), "BAD_CONTAINER"),
    "a shape of a terabyte": (
        meta(sizes=[{"as_int": 2**20}, {"as_int": 2**20}], strides=[{"as_int": 0}] * 2), "TOO_LARGE",
    ),
    "a symbolic shape": (
        meta(sizes=[{"as_expr": {"expr_str": "s0"}}, {"as_int": 4}]), "BAD_CONTAINER",
    ),
    "a negative stride": (meta(strides=[{"as_int": -4}, {"as_int": 1}]), "BAD_CONTAINER"),
    "an offset beyond": (meta(storage_offset={"as_int": 1}), "BAD_CONTAINER"),
    "true as a size": (meta(sizes=[{"as_int": True}, {"as_int": 4}]), "BAD_CONTAINER"),
    "sparse": (meta(layout=1), "UNSUPPORTED_TENSOR"),
    "complex128": (meta(dtype=11), "UNSUPPORTED_TENSOR"),
    "a dtype in words": (meta(dtype="7"), "UNSUPPORTED_TENSOR"),
    "on the meta device": (meta(device={"type": "meta", "index": None}), "UNSUPPORTED_TENSOR"),
    "tied in another dtype": (
        described(lambda p: p["tensor_meta"].update(dtype=4), name="last.weight"), "BAD_CONTAINER",
    ),
    "a name twice": (text('"last.bias"', '"first.bias"'), "BAD_CONTAINER"),
    "two tables in one": (text('{"config"', '{"config": {}, "config"'), "BAD_CONTAINER"),
    "no table": ((WEIGHTS, lambda _: b"{}"), "BAD_CONTAINER"),
    "a table that is a list": ((WEIGHTS, lambda _: b'{"config": []}'), "BAD_CONTAINER"),
    "a table that goes on": ((WEIGHTS, lambda data: data + b"{}"), "BAD_CONTAINER"),
    "a tensor without end": (
        (WEIGHTS, lambda _: b'{"config": {"w": ' + b'{"a":' * 500_000), "BAD_CONTAINER",
    ),
    "big-endian": (("byteorder", lambda _: b"big"), "BAD_CONTAINER"),
    "another layout": (("archive_version", lambda _: b"1"), "UNSUPPORTED_LAYOUT"),
    "another format": (("archive_format", lambda _: b"pt3"), "UNSUPPORTED_LAYOUT"),
    "a second program": (("models/other.json", lambda _: b"{}"), "PICKLED_ENTRY"),
    "weights of an older layout": (("data/weights/model.pt", lambda _: b"x"), "PICKLED_ENTRY"),
    "compiled code": (("data/aotinductor/model/code.so", lambda _: b"x"), "PICKLED_ENTRY"),
    "a program of torch.save": (("data.pkl", lambda _: b"x"), "PICKLED_ENTRY"),
}  # fmt: skip


@pytest.mark.parametrize("name", LIES)
def test_archives_that_lie_are_refused(tmp_path: Path, name: str) -> None:
    (entry, change), code = LIES[name]
    exported(tmp_path / "net.pt2", Net())
    edited(tmp_path / "net.pt2", entry, change)

    with pytest.raises(DomainError) as refusal:
        read(tmp_path / "net.pt2")

    assert refusal.value.error_code == code
    assert {path.name for path in tmp_path.iterdir()} == {"net.pt2"}


@pytest.mark.parametrize(
    "entry", [MODEL, "data/weights/weight_0", "data/constants/tensor_0", WEIGHTS]
)
def test_damage_is_noticed_wherever_it_is(tmp_path: Path, entry: str) -> None:
    path = tmp_path / "net.pt2"
    exported(path, Net())
    with zipfile.ZipFile(path) as archive:
        info = next(i for i in archive.infolist() if i.filename.endswith(f"/{entry}"))
    data = bytearray(path.read_bytes())
    start = info.header_offset + 30 + int.from_bytes(data[info.header_offset + 26 :][:2], "little")
    start += int.from_bytes(data[info.header_offset + 28 :][:2], "little")
    data[start + 8 if entry != WEIGHTS else start + 12] ^= 1
    path.write_bytes(data)

    with pytest.raises(DomainError) as refusal:
        read(path)

    assert refusal.value.error_code == "BAD_CONTAINER"


def test_programs_of_older_torch_say_what_to_do(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "old.pt2", "w") as archive:
        archive.writestr("version", "7.3")
        archive.writestr("serialized_exported_program.json", "{}")

    with pytest.raises(DomainError, match=r"before torch 2\.8") as refusal:
        sniff(tmp_path / "old.pt2")

    assert refusal.value.error_code == "UNKNOWN_CONTAINER"
