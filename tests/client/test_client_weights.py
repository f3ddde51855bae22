"""Safetensors files of our own, compared with the library's; FedProx compared with autograd."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from fl_client import BrokenFile
from fl_client.prox import proximal_gradient
from fl_client.safetensors_io import NUMPY_DTYPES, load, save
from fl_client.torch_support import get_weights, load_weights, proximal_term


def arrays() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    every = {
        f"a.{code}": rng.integers(0, 2, size=(3, 5)).astype(name)
        for code, name in NUMPY_DTYPES.items()
    }
    return every | {
        "scalar": np.array(2.5),
        "empty": np.zeros((0, 4), np.float32),
        "transposed": rng.normal(size=(3, 4)).T,
        "big endian": np.arange(4, dtype=">i4"),
        "ümlaut": np.ones(1, np.float16),
    }


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    save(tmp_path / "f", arrays())

    read = safetensors.numpy.load_file(tmp_path / "f")

    assert read.keys() == arrays().keys()
    for name, array in arrays().items():
        np.testing.assert_array_equal(read[name], array)
        assert read[name].shape == array.shape


def test_our_bytes_are_those_of_the_library(tmp_path: Path) -> None:
    weights = {"w": np.ones((2, 3), np.float32), "n": np.array([1]), "b": np.zeros(3, np.float32)}

    save(tmp_path / "f", weights)

    assert (tmp_path / "f").read_bytes() == safetensors.numpy.save(weights)


def test_we_read_what_the_library_writes(tmp_path: Path) -> None:
    native = {name: np.ascontiguousarray(a) for name, a in arrays().items() if name[0] == "a"}
    safetensors.numpy.save_file(native, tmp_path / "f", metadata={"kind": "full"})

    read = load(tmp_path / "f")

    for name, array in native.items():
        np.testing.assert_array_equal(read[name], array)
        assert read[name].dtype == array.dtype
        assert read[name].flags.writeable


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_dtypes_that_numpy_lacks_stay_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    safetensors.torch.save_file({"w": tensor}, tmp_path / "theirs")

    save(tmp_path / "ours", load(tmp_path / "theirs"))

    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def header(**tensors: Any) -> bytes:
    text = json.dumps(tensors).encode()
    return len(text).to_bytes(8, "little") + text


def entry(*offsets: int, dtype: str = "F32", shape: tuple[int, ...] = (1,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        (1 << 62).to_bytes(8, "little"),
        b"\2\0\0\0\0\0\0\0[]",
        b"\2\0\0\0\0\0\0\0{x",
        header(w=entry(0, 4)),
        header(w=entry(0, 4)) + bytes(5),
        header(w=entry(4, 8)) + bytes(8),
        header(w=entry(0, 4), v=entry(0, 4)) + bytes(4),
        header(w=entry(0, 4, shape=(2,))) + bytes(4),
        header(w=entry(0, 4, shape=(-1, -1))) + bytes(4),
        header(w=entry(0, 4, dtype="F31")) + bytes(4),
        header(w={"dtype": "F32"}) + bytes(4),
        header(w=entry(0)) + bytes(4),
        header(w=[]) + bytes(4),
    ],
)
def test_a_file_that_is_not_what_its_header_says_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "f").write_bytes(data)

    with pytest.raises(BrokenFile):
        load(tmp_path / "f")


@pytest.mark.parametrize("value", [[1.0], np.array(["text"]), np.array([1j])])
def test_what_is_no_weight_is_named(tmp_path: Path, value: Any) -> None:
    with pytest.raises(TypeError, match="'layer'"):
        save(tmp_path / "f", {"layer": value})


def test_a_module_takes_weights_and_gives_them_back() -> None:
    module = torch.nn.BatchNorm1d(3)
    weights = {name: value + 1 for name, value in get_weights(module).items()}

    load_weights(module, weights)

    for name, value in get_weights(module).items():
        np.testing.assert_array_equal(value, weights[name])


def test_weights_share_no_memory_with_the_module() -> None:
    module = torch.nn.Linear(2, 2)
    before = get_weights(module)
    kept = before["weight"].copy()

    module.weight.data += 1

    np.testing.assert_array_equal(before["weight"], kept)


def test_the_proximal_gradient_is_that_of_the_proximal_term() -> None:
    torch.manual_seed(0)
    module = torch.nn.Linear(3, 2)
    reference = {name: value + 0.5 for name, value in get_weights(module).items()}

    term = proximal_term(module, reference, 0.1)
    term.backward()
    gradient = proximal_gradient(get_weights(module), reference, 0.1)

    expected = sum(float(((w - reference[n]) ** 2).sum()) for n, w in get_weights(module).items())
    assert term.item() == pytest.approx(0.05 * expected, rel=1e-6)
    for name, parameter in module.named_parameters():
        np.testing.assert_allclose(gradient[name], parameter.grad, rtol=1e-6)
