"""Files that torch writes, read without torch and written back so that torch reads them: bit for bit."""

import argparse
import contextlib
import datetime as dt
import enum
import logging
import re
import subprocess
import sys
import types
import uuid
import warnings
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, reject, settings
from torch import Tensor, nn

from fl_server_ai.containers import extract, template_ties, write_back
from fl_server_core.exceptions import DomainError
from tests.ai import torch_files as files
from tests.ai.torch_files import Block, bits

# TorchScript is deprecated, but files of it will arrive for years.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def read(path: Path) -> dict[str, Tensor]:
    """Through the server's reader into canonical form, and that with the safetensors library."""
    target = path.with_suffix(".safetensors")
    target.unlink(missing_ok=True)
    extract(path, target)
    return safetensors.torch.load_file(target)


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert {name: bits(tensor) for name, tensor in found.items()} == {
        name: bits(tensor) for name, tensor in expected.items()
    }


def other_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Other numbers in the same tensors; those that are tied stay equal."""
    return {name: _flipped(tensor) for name, tensor in state.items()}


def _flipped(tensor: Tensor) -> Tensor:
    raw = files.packed(tensor) ^ 1
    return raw.view(tensor.dtype).reshape(tensor.shape)


def rewritten(template: Path, state: Mapping[str, Tensor]) -> Path:
    """The template's archive with these weights, as a client downloads it."""
    container = extract(template, template.with_suffix(".old")).container
    template.with_suffix(".old").unlink()
    weights, out = template.with_suffix(".new"), template.with_suffix(".back")
    weights.unlink(missing_ok=True)
    raw = template.with_suffix(".raw")
    raw.write_bytes(
        safetensors.torch.save({name: tensor.clone() for name, tensor in state.items()})
    )
    extract(raw, weights)
    raw.unlink(missing_ok=True)
    write_back(container, weights, out, template)
    return out


def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("torch")


@settings(deadline=None)
@given(state=files.state_dicts())
def test_every_state_dict_is_read_and_written_back(
    tmp_path_factory: pytest.TempPathFactory, state: dict[str, Tensor]
) -> None:
    path = folder(tmp_path_factory) / "state.pt"
    torch.save(state, path)

    same(read(path), state)

    new = other_weights(state)
    back = rewritten(path, new)
    same(torch.load(back, weights_only=True), new)
    same(torch.load(back, weights_only=False), new)
    same(torch.load(back, weights_only=True, mmap=True), new)
    assert back.stat().st_size == path.stat().st_size


@settings(deadline=None)
@given(module=files.modules())
def test_every_module_is_read_and_written_back(
    tmp_path_factory: pytest.TempPathFactory, module: nn.Module
) -> None:
    path = folder(tmp_path_factory) / "module.pt"
    torch.save(module, path)

    same(read(path), module.state_dict())

    new = other_weights(module.state_dict())
    loaded = torch.load(rewritten(path, new), weights_only=False)
    same(loaded.state_dict(), new)


@settings(deadline=None, max_examples=25)  # torch takes a tenth of a second for each
@given(module=files.modules())
def test_every_script_module_is_read_and_written_back(
    tmp_path_factory: pytest.TempPathFactory, module: nn.Module
) -> None:
    read_and_written_back(module, folder(tmp_path_factory) / "script.pt")


@pytest.mark.heavy
@settings(deadline=None, max_examples=500)
@given(module=files.modules())
def test_hundreds_of_script_modules_are_read_and_written_back(
    tmp_path_factory: pytest.TempPathFactory, module: nn.Module
) -> None:
    read_and_written_back(module, folder(tmp_path_factory) / "script.pt")


def read_and_written_back(module: nn.Module, path: Path) -> None:
    del module.settings, module.kind
    for part in module.modules():
        if isinstance(part, Block):
            part.__dict__.pop("settings", None)
            part.__dict__.pop("kind", None)
    try:
        files.scripted(module, path)
        expected = torch.jit.load(path).state_dict()
    except (RuntimeError, AttributeError):  # torch can't script every layer, nor load all it saves
        reject()

    same(read(path), expected)

    new = other_weights(expected)
    same(torch.jit.load(rewritten(path, new)).state_dict(), new)


def outputs(module: nn.Module, inputs: Tensor) -> tuple[Any, ...]:
    with torch.no_grad():
        return bits(module.eval()(inputs))


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)
    )  # fmt: skip


def test_what_comes_back_computes_what_the_module_with_the_new_weights_computes(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    module, trained, inputs = network(), network(), torch.rand(2, 1, 8, 8)
    new = trained.state_dict()
    expected = outputs(trained, inputs)
    assert expected != outputs(module, inputs)

    files.scripted(module, tmp_path / "scripted.pt")
    torch.jit.trace(module.eval(), inputs).save(str(tmp_path / "traced.pt"))
    torch.save(module, tmp_path / "whole.pt")
    torch.save(module.state_dict(), tmp_path / "state.pt")

    assert outputs(torch.jit.load(rewritten(tmp_path / "scripted.pt", new)), inputs) == expected
    assert outputs(torch.jit.load(rewritten(tmp_path / "traced.pt", new)), inputs) == expected
    whole = torch.load(rewritten(tmp_path / "whole.pt", new), weights_only=False)
    assert outputs(whole, inputs) == expected
    module.load_state_dict(torch.load(rewritten(tmp_path / "state.pt", new)))
    assert outputs(module, inputs) == expected


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol_that_torch_can_load_is_read(tmp_path: Path, protocol: int) -> None:
    module = network()
    path = tmp_path / "module.pt"
    torch.save(module, path, pickle_protocol=protocol)

    same(read(path), module.state_dict())


def test_parameters_ordered_dicts_and_lists_of_tensors_are_read(tmp_path: Path) -> None:
    state = OrderedDict(a=nn.Parameter(torch.ones(2)), b=torch.zeros(3, dtype=torch.int64))
    path = tmp_path / "weights.pt"

    for saved in (state, dict(state)):
        torch.save(saved, path)
        same(read(path), state)
    for several in (list(state.values()), tuple(state.values())):
        torch.save(several, path)
        same(read(path), {"0": state["a"], "1": state["b"]})


def test_a_class_that_only_the_client_has_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("hospital_models")
    code = "class Net(Base):\n    pass\n"
    exec(compile(code, "hospital_models", "exec"), {"Base": Block}, module.__dict__)  # noqa: S102
    module.Net.__module__ = "hospital_models"
    net = module.Net()
    net.register_parameter("w", nn.Parameter(torch.ones(2)))
    with monkeypatch.context() as context:
        context.setitem(sys.modules, "hospital_models", module)
        torch.save(net, tmp_path / "net.pt")

    same(read(tmp_path / "net.pt"), {"w": torch.ones(2)})


def test_ties_are_found_and_tensors_that_overlap_otherwise_cannot_be_written(
    tmp_path: Path,
) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tied, apart, overlapping = tmp_path / "tied.pt", tmp_path / "apart.pt", tmp_path / "over.pt"
    torch.save({"a": base, "b": base, "c": torch.ones(2)}, tied)
    torch.save({"left": base[:, :2], "right": base[:, 2:]}, apart)
    torch.save({"most": base[:, :3], "some": base[:, 2:]}, overlapping)
    repeated = tmp_path / "repeated.pt"
    torch.save({"a": torch.ones(1).expand(3)}, repeated)

    assert template_ties("torch", tied) == (("a", "b"),)
    assert template_ties("torch", apart) == ()
    same(read(overlapping), {"most": base[:, :3], "some": base[:, 2:]})
    same(read(repeated), {"a": torch.ones(3)})
    for path in (overlapping, repeated):
        with pytest.raises(DomainError) as refusal:
            template_ties("torch", path)
        assert refusal.value.error_code == "OVERLAPPING_TENSORS"
    new = {"left": torch.zeros(3, 2), "right": torch.ones(3, 2)}
    same(torch.load(rewritten(apart, new)), new)


def test_one_tensor_alone_is_read_like_a_list_of_one(tmp_path: Path) -> None:
    torch.save(torch.ones(2), tmp_path / "file.pt")

    same(read(tmp_path / "file.pt"), {"0": torch.ones(2)})


REFUSED: dict[str, tuple[Any, str, str]] = {
    "a checkpoint": (
        {"epoch": 3, "state_dict": {"w": torch.ones(1)}}, "NOT_A_STATE_DICT", "under 'state_dict'"
    ),
    "a dict with a number": ({"w": torch.ones(1), "n": 3}, "NOT_A_STATE_DICT", "'n' holds int"),
    "a text": ("hello", "NOT_A_STATE_DICT", "holds str"),
    "an optimizer": (
        torch.optim.SGD([nn.Parameter(torch.ones(1))]), "NOT_A_STATE_DICT", "no torch.nn.Module"
    ),
    "sparse": ({"w": torch.eye(2).to_sparse()}, "UNSUPPORTED_TENSOR", "'w'"),
    "complex128": ({"w": torch.ones(1, dtype=torch.complex128)}, "UNSUPPORTED_TENSOR", "'w'"),
    "meta": ({"w": torch.ones(1, device="meta")}, "UNSUPPORTED_TENSOR", "'w'"),
    "conjugate": ({"w": torch.ones(1, dtype=torch.complex64).conj()}, "UNSUPPORTED_TENSOR", "'w'"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_holds_no_plain_named_tensors_is_refused_with_what_to_do(
    tmp_path: Path, name: str
) -> None:
    saved, code, says = REFUSED[name]
    torch.save(saved, tmp_path / "file.pt")

    with pytest.raises(DomainError, match=says) as refusal:
        read(tmp_path / "file.pt")

    assert refusal.value.error_code == code


def test_files_as_torch_1_6_laid_them_out_are_read_and_written_back(tmp_path: Path) -> None:
    module = network()
    state = module.state_dict()
    for part in module.modules():
        for held in ("_parameters", "_buffers", "_modules"):
            part.__dict__[held] = OrderedDict(part.__dict__[held])
        for later in (
            "_forward_hooks_with_kwargs",
            "_state_dict_pre_hooks",
            "_is_full_backward_hook",
        ):
            part.__dict__.pop(later, None)
    torch.save(module, tmp_path / "today.pt")
    files.scripted(network(), tmp_path / "script.pt")
    for name in ("today.pt", "script.pt"):
        old = tmp_path / f"old-{name}"
        with zipfile.ZipFile(tmp_path / name) as now, zipfile.ZipFile(old, "w") as then:
            for entry in now.namelist():
                if not entry.endswith(("byteorder", "_id", "_version", "_alignment", "/version")):
                    then.writestr(f"archive/{entry.partition('/')[2]}", now.read(entry))
            then.writestr("archive/version", b"3\n")
    new = other_weights(state)

    old_module, old_script = tmp_path / "old-today.pt", tmp_path / "old-script.pt"
    same(read(old_module), state)
    loaded = torch.load(rewritten(old_module, new), weights_only=False)
    same({**dict(loaded.named_parameters()), **dict(loaded.named_buffers())}, new)
    same(torch.jit.load(rewritten(old_script, new)).state_dict(), new)


class Kind(enum.Enum):
    WIDE = "wide"


HELD: dict[str, Any] = {
    "a range": range(3), "a type": int, "a uuid": uuid.uuid4(), "arguments": argparse.Namespace(a=1),
    "a logger": logging.getLogger("site"), "a pattern": re.compile("x+"), "a function": torch.relu,
    "an enum": Kind.WIDE, "a zone": dt.UTC, "an array": np.ones(3), "a device": torch.device("cpu"),
    "a defaultdict": defaultdict(int), "a size": torch.Size([1, 2]), "a path": Path("x"),
}  # fmt: skip


@pytest.mark.parametrize("name", HELD)
def test_modules_may_hold_what_modules_hold(tmp_path: Path, name: str) -> None:
    module = Block()
    module.held = HELD[name]
    module.register_parameter("w", nn.Parameter(torch.ones(2)))
    torch.save(module, tmp_path / "module.pt")

    same(read(tmp_path / "module.pt"), {"w": torch.ones(2)})


def test_hooks_that_a_module_holds_are_no_obstacle(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    module.handle = module[0].register_forward_hook(print)
    with contextlib.suppress(AttributeError, TypeError):
        torch.save(module, tmp_path / "module.pt")
        with pytest.raises(DomainError, match="print"):
            read(tmp_path / "module.pt")


def test_modules_that_pack_or_rename_their_weights_are_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings(action="ignore"):
        quantized = torch.ao.quantization.quantize_dynamic(
            nn.Sequential(nn.Linear(2, 2)), {nn.Linear}, dtype=torch.qint8
        )
    renamed = nn.Sequential(nn.Linear(2, 2))
    renamed._register_state_dict_hook(rename)
    for module in (nn.Sequential(nn.Conv2d(1, 1, 1), quantized), renamed):
        torch.save(module, tmp_path / "module.pt")
        with pytest.raises(DomainError, match="state_dict") as refusal:
            read(tmp_path / "module.pt")
        assert refusal.value.error_code == "UNSUPPORTED_TENSOR"


def rename(module: nn.Module, state: dict[str, Tensor], *_: Any) -> None:
    state["renamed"] = state.pop("0.weight")


class Ops(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ops = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.ops(x)


def test_a_submodule_may_be_called_ops(tmp_path: Path) -> None:
    module = Ops()
    files.scripted(module, tmp_path / "script.pt")

    same(read(tmp_path / "script.pt"), module.state_dict())


def test_files_before_torch_1_6_are_named(tmp_path: Path) -> None:
    path = tmp_path / "old.pt"
    torch.save({"w": torch.ones(2)}, path, _use_new_zipfile_serialization=False)

    with pytest.raises(DomainError, match=r"before torch 1\.6.*torch\.save") as refusal:
        read(path)

    assert refusal.value.error_code == "UNKNOWN_CONTAINER"


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    torch.save({"w": torch.full((64,), 1.5)}, path)
    data = bytearray(path.read_bytes())
    at = data.index(bytes(torch.full((4,), 1.5).numpy().tobytes()))
    data[at] ^= 1
    path.write_bytes(data)

    with pytest.raises(DomainError, match="wrong CRC"):
        read(path)

    assert not path.with_suffix(".safetensors").exists()


READER = """
import resource, sys
from pathlib import Path
from fl_server_ai.containers import extract, write_back
source, target, back = map(Path, sys.argv[1:])
small = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
container = extract(source, target).container
write_back(container, target, back, source)
assert "torch" not in sys.modules
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - small)
"""


@pytest.mark.parametrize("script", [False, True], ids=["torch.save", "TorchScript"])
def test_a_large_archive_is_never_held_in_memory_and_torch_is_not_needed(
    tmp_path: Path, script: bool
) -> None:
    module = nn.Linear(4096, 8192, bias=False)  # 128 MiB
    path = tmp_path / "large.pt"
    if script:
        files.scripted(module, path)
    else:
        torch.save(module, path)

    run = subprocess.run(
        [sys.executable, "-c", READER, str(path), str(tmp_path / "t"), str(tmp_path / "back")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip

    assert int(run.stdout) * 1024 < 32 * 2**20
    assert (tmp_path / "back").read_bytes() == path.read_bytes()
