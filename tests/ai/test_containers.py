"""Containers against the libraries that define them: safetensors and numpy."""

import hashlib
import io
import json
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.lib import format as npy_format
from safetensors import numpy as library

from fl_server_ai.containers import (
    check_against,
    check_finite,
    extract,
    read_manifest,
    sniff,
    write_back,
)
from fl_server_core.exceptions import (
    BadContainer,
    DomainError,
    DtypeMismatch,
    KeyMismatch,
    NonFinite,
    ShapeMismatch,
    Unusable,
)

DTYPES = ["?", "u1", "i1", "<i2", "<u2", "<f2", "<i4", "<u4", "<f4", "<f8", "<i8", "<u8"]
NAMES = st.text("abé.0_", min_size=1, max_size=8)
ARRAYS = st.dictionaries(
    NAMES,
    st.sampled_from(DTYPES).flatmap(
        lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0))
    ),
    max_size=6,
)
FEW = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def put(folder: Path, data: bytes, name: str = "source") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def target(folder: Path) -> Path:
    path = folder / "target"
    path.unlink(missing_ok=True)
    return path


def npz(arrays: dict[str, np.ndarray], *, compressed: bool = False) -> bytes:
    buffer = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(buffer, **arrays)
    return buffer.getvalue()


@FEW
@given(arrays=ARRAYS)
def test_what_the_library_writes_is_canonical_and_only_moved(tmp_path: Path, arrays) -> None:
    data = library.save(arrays)

    found = extract(put(tmp_path, data), out := target(tmp_path))

    assert not found.rewritten
    assert out.read_bytes() == data
    assert found.digest == hashlib.sha256(data).hexdigest()
    assert {t.name: t.shape for t in found.manifest.tensors} == {
        name: array.shape for name, array in arrays.items()
    }


@FEW
@given(arrays=ARRAYS)
def test_metadata_and_order_do_not_survive_so_equal_weights_are_equal_bytes(
    tmp_path: Path, arrays
) -> None:
    plain = library.save(arrays)

    found = extract(
        put(tmp_path, library.save(arrays, metadata={"by": "me"})), out := target(tmp_path)
    )

    assert out.read_bytes() == plain
    assert found.rewritten


@FEW
@given(arrays=ARRAYS, compressed=st.booleans())
def test_npz_becomes_what_the_library_would_write(tmp_path: Path, arrays, compressed: bool) -> None:
    extract(put(tmp_path, npz(arrays, compressed=compressed)), out := target(tmp_path))

    assert out.read_bytes() == library.save(arrays)


@FEW
@given(arrays=ARRAYS)
def test_npz_is_written_back_bit_for_bit_and_twice_the_same(tmp_path: Path, arrays) -> None:
    canonical = put(tmp_path, library.save(arrays), "canonical")

    write_back("npz", canonical, tmp_path / "one.npz")
    write_back("npz", canonical, tmp_path / "two.npz")

    with np.load(tmp_path / "one.npz", allow_pickle=False) as found:
        assert set(found.files) == set(arrays)
        for name, array in arrays.items():
            assert found[name].tobytes() == array.tobytes()
            assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()


def test_fortran_order_and_big_endian_are_straightened(tmp_path: Path) -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    arrays = {"fortran": np.asfortranarray(array), "big": array.astype(">f4")}

    extract(put(tmp_path, npz(arrays)), out := target(tmp_path))

    assert out.read_bytes() == library.save({"fortran": array, "big": array})


@FEW
@given(data=st.data(), arrays=ARRAYS, kind=st.sampled_from(["safetensors", "npz", "npz deflated"]))
def test_damaged_files_are_refused_or_read_but_never_an_accident(
    tmp_path: Path, data, arrays, kind: str
) -> None:
    raw = (
        library.save(arrays)
        if kind == "safetensors"
        else npz(arrays, compressed="deflated" in kind)
    )
    broken = bytearray(raw)
    for _ in range(data.draw(st.integers(1, 4))):
        broken[data.draw(st.integers(0, len(broken) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(broken)))
    source, out = put(tmp_path, bytes(broken[:cut])), target(tmp_path)

    try:
        extract(source, out)
    except DomainError:
        assert not out.exists()


@FEW
@given(data=st.binary(max_size=200))
def test_any_bytes_at_all_are_a_domain_error_or_a_file(tmp_path: Path, data: bytes) -> None:
    source, out = put(tmp_path, data), target(tmp_path)

    try:
        extract(source, out)
    except DomainError:
        assert not out.exists()


@pytest.mark.parametrize(
    ("data", "says", "code"),
    [
        (b"", "empty", "UNKNOWN_CONTAINER"),
        (b"hello, world, this is text", "no container", "UNKNOWN_CONTAINER"),
        (b"\x80\x02}q\x00.", "a pickle", "UNKNOWN_CONTAINER"),
        (
            b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M",
            "before torch 1.6",
            "UNKNOWN_CONTAINER",
        ),
        (b"\x89HDF\r\n\x1a\n" + bytes(20), "no container", "UNKNOWN_CONTAINER"),
    ],
    ids=["empty", "text", "pickle", "old torch", "hdf5"],
)
def test_what_is_not_read_here_says_what_it_is_and_what_is_read(
    tmp_path: Path, data: bytes, says: str, code: str
) -> None:
    with pytest.raises(DomainError, match=rf"{says}.*safetensors, \.npz, torch") as refusal:
        sniff(put(tmp_path, data))

    assert refusal.value.error_code == code


def test_a_torch_file_that_is_cut_off_is_named_as_such(tmp_path: Path) -> None:
    import torch

    torch.save({"w": torch.zeros(2)}, tmp_path / "state.pt")
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        script = torch.jit.trace(torch.nn.Linear(2, 1), torch.zeros(1, 2))
        script.save(str(tmp_path / "script.pt"))

    for name in ("state.pt", "script.pt"):
        data = (tmp_path / name).read_bytes()
        with pytest.raises(BadContainer, match="damaged torch"):
            sniff(put(tmp_path, data[:-100]))


def test_a_target_that_is_there_survives(tmp_path: Path) -> None:
    for data in (library.save({}), library.save({}, metadata={"a": "b"}), npz({})):
        source, taken = put(tmp_path, data), put(tmp_path, b"someone's", "target")

        with pytest.raises(FileExistsError):
            extract(source, taken)

        assert taken.read_bytes() == b"someone's"
        assert source.read_bytes() == data


def test_a_digest_from_the_upload_is_believed_only_for_bytes_that_are_kept(tmp_path: Path) -> None:
    kept = extract(put(tmp_path, library.save({})), target(tmp_path), sha256="known")
    moved = extract(put(tmp_path, npz({})), target(tmp_path), sha256="known")

    assert kept.digest == "known"
    assert moved.digest == hashlib.sha256(library.save({})).hexdigest()


@FEW
@given(
    array=hnp.arrays("<f4", hnp.array_shapes(min_dims=0, max_dims=4, min_side=0)),
    version=st.sampled_from([(1, 0), (2, 0), (3, 0)]),
    big=st.booleans(),
    compressed=st.booleans(),
)
def test_every_order_of_axes_and_bytes_and_every_npy_version_is_read(
    tmp_path: Path, array, version, big: bool, compressed: bool
) -> None:
    sent = np.asfortranarray(array).reshape(array.shape, order="F").astype(">f4" if big else "<f4")
    buffer = io.BytesIO()
    npy_format.write_array(buffer, sent, version=version)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", 8 if compressed else 0) as packed:
        packed.writestr("w.npy", buffer.getvalue())

    extract(put(tmp_path, archive.getvalue()), out := target(tmp_path))

    assert out.read_bytes() == library.save({"w": array})


@pytest.mark.parametrize("shape", [(700, 1100), (3, 700, 401), (1, 1, 500_001), (1_000_003, 1)])
def test_fortran_order_larger_than_a_block_is_straightened(tmp_path: Path, shape) -> None:
    array = np.random.default_rng(0).standard_normal(shape).astype(np.float64)

    extract(put(tmp_path, npz({"w": np.asfortranarray(array)})), out := target(tmp_path))

    assert out.read_bytes() == library.save({"w": array})
    assert {path.name for path in tmp_path.iterdir()} == {"source", "target"}


def test_every_dtype_of_the_library_lies_where_the_library_puts_it(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save

    floats = ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]
    integers = [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]
    names = [*floats, *integers, "bool", "complex64"]
    tensors = {
        f"{prefix}{name}": torch.ones(3).to(getattr(torch, name))
        for name in names
        for prefix in "zA"
    }
    tensors |= {"empty": torch.zeros(0, 4), "scalar": torch.tensor(1.5)}
    plain = save(tensors)

    kept = extract(put(tmp_path, plain), target(tmp_path))
    found = extract(put(tmp_path, save(tensors, {"a": "b"})), out := target(tmp_path))

    assert not kept.rewritten
    assert found.rewritten
    assert out.read_bytes() == plain
    assert found.digest == kept.digest == hashlib.sha256(plain).hexdigest()
    assert found.manifest.num_params == sum(tensor.numel() for tensor in tensors.values())


def test_names_may_hold_brackets_quotes_and_any_script(tmp_path: Path) -> None:
    names = [f'w[{n}{{"\\é漢😀' for n in range(200)]
    plain = library.save({name: np.zeros(1, np.float32) for name in names})

    found = extract(put(tmp_path, plain), target(tmp_path))

    assert not found.rewritten
    assert {tensor.name for tensor in found.manifest.tensors} == set(names)


def test_tensors_may_lie_in_any_order_with_spaces_in_the_header(tmp_path: Path) -> None:
    header = json.dumps(
        {
            "b": {"shape": [1], "data_offsets": [0, 4], "dtype": "F32"},
            "a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
        },
        indent=3,
    ).encode()
    data = len(header).to_bytes(8, "little") + header + np.array([2, 1], "<f4").tobytes()

    extract(put(tmp_path, data), out := target(tmp_path))

    assert out.read_bytes() == library.save(
        {k: np.array([v], "<f4") for k, v in (("a", 1), ("b", 2))}
    )


WEIGHTS = {"a.weight": np.ones((2, 3), np.float32), "a.bias": np.ones(2, np.float32)}


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (lambda w: w.pop("a.bias"), KeyMismatch, "missing 'a.bias'"),
        (lambda w: w.update(b=np.ones(1, np.float32)), KeyMismatch, "unexpected 'b'"),
        (lambda w: w.update({"a.bias": np.ones(1, np.float32)}), ShapeMismatch, "'a.bias'"),
        (lambda w: w.update({"a.bias": np.ones(2, np.float64)}), DtypeMismatch, "'a.bias' is F64"),
    ],
    ids=["missing", "extra", "shape", "dtype"],
)
def test_a_mismatch_names_the_tensor(tmp_path: Path, change, error, says: str) -> None:
    changed = dict(WEIGHTS)
    change(changed)
    expected = read_manifest(put(tmp_path, library.save(WEIGHTS), "expected"))

    with pytest.raises(error, match=says):
        check_against(read_manifest(put(tmp_path, library.save(changed))), expected)


def test_a_mismatch_carries_what_was_expected_and_lists_ten_names_at_most(tmp_path: Path) -> None:
    many = {f"w{n:02}": np.ones(1, np.float32) for n in range(30)}
    expected = read_manifest(put(tmp_path, library.save(WEIGHTS), "expected"))
    other = WEIGHTS | {"a.bias": np.ones((2, 1), np.float32)}

    with pytest.raises(KeyMismatch) as keys:
        check_against(read_manifest(put(tmp_path, library.save(many))), expected)
    with pytest.raises(ShapeMismatch) as shape:
        check_against(read_manifest(put(tmp_path, library.save(other))), expected)

    assert keys.value.data == {
        "missing": ["a.bias", "a.weight"],
        "unexpected": sorted(many)[:10],
    }
    assert shape.value.data == {"tensor": "a.bias", "expected": [2], "got": [2, 1]}


@pytest.mark.parametrize("prefix", ["module.", "_module.", "_orig_mod."])
@pytest.mark.parametrize("wrapped_is", ["sent", "global"])
def test_a_wrapper_prefix_is_named(tmp_path: Path, prefix: str, wrapped_is: str) -> None:
    wrapped = {prefix + name: array for name, array in WEIGHTS.items()}
    sent, model = (wrapped, WEIGHTS) if wrapped_is == "sent" else (WEIGHTS, wrapped)
    expected = read_manifest(put(tmp_path, library.save(model), "expected"))

    with pytest.raises(KeyMismatch, match=f"wrapper prefix '{prefix}'"):
        check_against(read_manifest(put(tmp_path, library.save(sent))), expected)


@pytest.mark.parametrize(
    "name",
    ["float16", "bfloat16", "float32", "float64", "complex64", "float8_e5m2", "float8_e4m3fn"],
)
@pytest.mark.parametrize("bad", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("at", [0, 4_999])
def test_not_a_number_and_infinity_are_found_anywhere(
    tmp_path: Path, name: str, bad: str, at: int
) -> None:
    import torch
    from safetensors.torch import save

    dtype = getattr(torch, name)
    if name == "float8_e4m3fn" and "inf" in bad:
        bad = "nan"  # it has no infinity
    values = torch.ones(5_000).to(dtype)
    clean = put(tmp_path, save({"w": values}), "clean")
    values[at] = torch.tensor(float(bad)).to(dtype)
    dirty = put(tmp_path, save({"ok": torch.ones(3), "w": values}))

    check_finite(clean, read_manifest(clean))
    with pytest.raises(NonFinite) as refusal:
        check_finite(dirty, read_manifest(dirty))

    assert refusal.value.data == {"tensor": "w", "index": at}


def test_the_largest_and_the_smallest_numbers_are_finite(tmp_path: Path) -> None:
    info = np.finfo(np.float32)
    extremes = np.array([info.max, info.min, info.tiny, info.smallest_subnormal, -0.0], np.float32)
    path = put(tmp_path, library.save({"w": np.tile(extremes, 1000)}))

    check_finite(path, read_manifest(path))


def test_integers_may_have_any_bits(tmp_path: Path) -> None:
    path = put(tmp_path, library.save({"n": np.full(9, 0x7F800000, np.int32)}))

    check_finite(path, read_manifest(path))


def test_bfloat16_has_no_place_in_npz_and_says_so(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save

    path = put(tmp_path, save({"w": torch.zeros(2, dtype=torch.bfloat16)}))

    with pytest.raises(Unusable) as refusal:
        write_back("npz", path, tmp_path / "out")

    assert refusal.value.error_code == "NOT_REPRESENTABLE"
    assert not (tmp_path / "out").exists()
