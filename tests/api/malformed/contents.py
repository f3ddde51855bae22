"""Tensors, numbers, kinds, encodings and extras that are not what the training takes."""

import json
import struct
from typing import Any

import numpy as np
from safetensors.numpy import save

from tests.api.malformed.case import HONEST, Case, case, sent
from tests.scenes import Arrays, weights

W, B, N = "layer.weight", "layer.bias", "steps"
BASE = weights(1.0)
ONES = np.ones(3, np.float32)
DC = f"extra.scaffold.dc.{B}"


def bad(
    name: str,
    code: str,
    say: str,
    tensors: Arrays,
    to: str = "main",
    status: int = 422,
    **told: Any,
) -> Case:
    """Safetensors of these tensors, where None is left out; `told` is its metadata."""
    kept = {key: value for key, value in tensors.items() if value is not None}
    metadata = {key: str(value) for key, value in told.items()} or None
    return case(name, status, code, say, *sent(lambda: save(kept, metadata)), to=to)


def but(**changed: Any) -> Arrays:
    """The honest tensors but for these, in whose names __ is a dot."""
    return {**BASE, **{name.replace("__", "."): value for name, value in changed.items()}}


def filled(value: float, dtype: Any = np.float32) -> np.ndarray:
    return np.array([1.0, value, 1.0], dtype)


def bits(dtype: str, size: int, pattern: bytes) -> bytes:
    """A bias of a dtype that numpy has not, in one whole file."""
    entries: dict[str, Any] = {B: {"dtype": dtype, "shape": [3], "data_offsets": [0, 3 * size]}}
    raw = json.dumps(entries).encode()
    return struct.pack("<Q", len(raw)) + raw + pattern * 3


TENSORS = [
    bad("a tensor is missing", "KEY_MISMATCH", "missing|steps", but(steps=None)),
    bad("a tensor more", "KEY_MISMATCH", "unexpected|'x'", but(x=ONES)),
    bad("no tensors at all", "KEY_MISMATCH", "missing", {}),
    bad("names of a wrapper", "KEY_MISMATCH", "'module.'|unwrap", {f"module.{k}": v for k, v in BASE.items()}),
    bad("a name in capitals", "KEY_MISMATCH", "Steps", but(steps=None, Steps=BASE[N])),
    bad("a name with a space", "KEY_MISMATCH", "'steps '", {**but(steps=None), "steps ": BASE[N]}),
    bad("a name with a NUL", "BAD_CONTAINER", "name", {**but(steps=None), "steps\0": BASE[N]}),
    bad("a longer tensor", "SHAPE_MISMATCH", f"{B}|[4]|[3]", but(layer__bias=np.ones(4, np.float32))),
    bad("a transposed tensor", "SHAPE_MISMATCH", f"{W}|[2, 3]", but(layer__weight=np.ones((2, 3), np.float32))),
    bad("a flat tensor", "SHAPE_MISMATCH", f"{W}|[6]", but(layer__weight=np.ones(6, np.float32))),
    bad("one number for a scalar", "SHAPE_MISMATCH", f"{N}|[1]|[]", but(steps=np.ones(1, np.int64))),
    bad("an empty tensor", "SHAPE_MISMATCH", f"{B}|[0]", but(layer__bias=np.ones(0, np.float32))),
    bad("a double for a float", "DTYPE_MISMATCH", f"{B}|F64|F32", but(layer__bias=np.ones(3))),
    bad("half a float", "DTYPE_MISMATCH", f"{B}|F16", but(layer__bias=np.ones(3, np.float16))),
    bad("a short for a long", "DTYPE_MISMATCH", f"{N}|I32|I64", but(steps=np.array(1, np.int32))),
    bad("a float for a counter", "DTYPE_MISMATCH", f"{N}|F32", but(steps=np.array(1, np.float32))),
    bad("bools for floats", "DTYPE_MISMATCH", f"{B}|BOOL", but(layer__bias=np.ones(3, bool))),
    bad("NaN", "NON_FINITE", f"{B}|flat index 1", but(layer__bias=filled(np.nan))),
    bad("infinity", "NON_FINITE", f"{B}|flat index 1", but(layer__bias=filled(np.inf))),
    bad("minus infinity", "NON_FINITE", B, but(layer__bias=filled(-np.inf))),
    bad("NaN with a sign and a payload", "NON_FINITE", B,
        but(layer__bias=np.array([0xFFC0_0001] * 3, np.uint32).view(np.float32))),
    case("a lone float8", 422, "KEY_MISMATCH", W, *sent(lambda: bits("F8_E5M2", 1, b"\x7c"))),
]  # fmt: skip

ORDER = [
    bad("a missing tensor before a wrong shape", "KEY_MISMATCH", N, but(steps=None, layer__bias=np.ones(4))),
    bad("a wrong shape before a wrong dtype", "SHAPE_MISMATCH", W,
        but(layer__weight=np.ones((2, 3), np.float32), layer__bias=np.ones(3))),
    bad("a wrong dtype before NaN", "DTYPE_MISMATCH", W, but(layer__weight=np.ones((3, 2)), layer__bias=filled(np.nan))),
    bad("another version before what is in the file", "BASE_VERSION", "version 7", but(steps=None), status=409,
        kind="delta", base_version=7),
]  # fmt: skip


def sparse(values: list[float], index: Any, dtype: Any = np.uint32) -> Arrays:
    return {B: np.array(values, np.float32), f"extra.enc.index.{B}": np.array(index, dtype)}


KINDS = [
    bad("an unknown kind", "UNKNOWN_KIND", "masked|delta", BASE, kind="masked"),
    bad("a kind of a megabyte", "UNKNOWN_KIND", "delta", BASE, kind="x" * 2**20),
    bad("a gradient for weights", "KIND_NOT_TAKEN", "full|gradient", BASE, kind="gradient"),
    bad("weights for a gradient", "KIND_NOT_TAKEN", "gradient|delta", BASE, "FedSGD", kind="delta"),
    bad("a delta for a mask", "KIND_NOT_TAKEN", "full|delta", BASE, "FedPM", kind="delta"),
    bad("a mask of halves", "NOT_A_MASK", "layer.|ones", weights(0.5), "FedPM"),
    bad("a delta of another version", "BASE_VERSION", "version 3|version 0", BASE, status=409, kind="delta",
        base_version=3),
    bad("a version in metadata that is negative", "BAD_METADATA", "base_version", BASE, base_version=-1),
    bad("a version in metadata of ten digits", "BAD_METADATA", "base_version", BASE, base_version=10**9),
    bad("a delta without a tensor", "KEY_MISMATCH", "missing|subset", {W: BASE[W]}, kind="delta"),
    bad("a delta of another shape", "SHAPE_MISMATCH", B, but(layer__bias=np.ones(4, np.float32)), kind="delta"),
    bad("a delta with NaN", "NON_FINITE", B, but(layer__bias=filled(np.nan)), kind="delta"),
    bad("a delta beyond the dtype", "NON_FINITE", B, but(layer__bias=filled(3.4e38)), "huge", kind="delta"),
    bad("a subset of another model", "KEY_MISMATCH", "other", {"other": ONES}, kind="subset"),
    bad("a subset of nothing", "KEY_MISMATCH", "no weights", {}, kind="subset"),
    bad("a subset for a geometric median", "PARTIAL_NOT_TAKEN", "GeometricMedian|all tensors", {W: BASE[W]}, "GeometricMedian",
        kind="subset"),
    bad("a subset in a daisy chain", "PARTIAL_NOT_TAKEN", "daisy chain|whole", {W: BASE[W]}, "chain", kind="subset"),
    bad("sparse numbers for a median", "PARTIAL_NOT_TAKEN", "subset", sparse([1.0], [0]), "FedMedian", kind="sparse"),
    bad("a tensor that stays with the sites", "TENSOR_EXCLUDED", f"{B}|leave it out", BASE, "no bias"),
    bad("indices that repeat", "BAD_INDEX", f"{B}|ascend", sparse([1.0, 2.0], [1, 1]), kind="sparse"),
    bad("indices that fall", "BAD_INDEX", f"{B}|ascend", sparse([1.0, 2.0], [1, 0]), kind="sparse"),
    bad("an index beyond the tensor", "BAD_INDEX", f"{B}|below 3", sparse([1.0], [3]), kind="sparse"),
    bad("a negative index", "BAD_INDEX", f"{B}|ascend", sparse([1.0], [-1], np.int64), kind="sparse"),
    bad("more indices than numbers", "BAD_INDEX", f"{B}|as long", sparse([1.0], [0, 1]), kind="sparse"),
    bad("indices that are floats", "BAD_INDEX", f"{B}|U32", sparse([1.0], [0.0], np.float32), kind="sparse"),
    bad("more numbers than the tensor has", "BAD_INDEX", B, sparse([1.0] * 4, [0, 1, 2, 3]), kind="sparse"),
    bad("a sparse NaN", "NON_FINITE", B, sparse([np.nan], [0]), kind="sparse"),
]  # fmt: skip

INT8 = {**BASE, B: np.zeros(3, np.uint8)}
QSGD = {**BASE, B: np.array([1, 2, 9], np.int8), f"extra.enc.norm.{B}": np.array(1.0)}
ENCODINGS = [
    bad("an unknown encoding", "UNKNOWN_ENCODING", "zip|int8", BASE, encoding="zip"),
    bad("top-k of weights", "BAD_ENCODING", "delta|sparse", BASE, encoding="topk"),
    bad("int8 without a scale", "BAD_ENCODING", f"extra.enc.scale.{B}", INT8, encoding="int8"),
    bad("int8 without a zero", "BAD_ENCODING", f"extra.enc.zero.{B}",
        {**INT8, f"extra.enc.scale.{B}": np.array(1.0)}, encoding="int8"),
    bad("int8 with two scales", "BAD_ENCODING", f"extra.enc.scale.{B}",
        {**INT8, f"extra.enc.scale.{B}": np.ones(2)}, encoding="int8"),
    bad("int8 with a scale of infinity", "NON_FINITE", f"extra.enc.scale.{B}",
        {**INT8, f"extra.enc.scale.{B}": np.array(np.inf), f"extra.enc.zero.{B}": np.array(0.0)}, encoding="int8"),
    bad("a scale of nobody", "BAD_ENCODING", "nobody", {**BASE, "extra.enc.scale.nobody": np.array(1.0)},
        encoding="int8"),
    bad("qsgd without levels", "BAD_METADATA", "levels|32767", QSGD, encoding="qsgd"),
    bad("qsgd of no levels", "BAD_METADATA", "levels", QSGD, encoding="qsgd", levels=0),
    bad("qsgd with a level beyond", "BAD_ENCODING", f"{B}|beyond 4", QSGD, encoding="qsgd", levels=4),
    bad("qsgd without a norm", "BAD_ENCODING", f"extra.enc.norm.{B}", {**BASE, B: np.ones(3, np.int8)},
        encoding="qsgd", levels=4),
    bad("bytes for half floats", "DTYPE_MISMATCH", f"{B}|fp16", INT8, encoding="fp16"),
    bad("half floats under the other's name", "DTYPE_MISMATCH", f"{B}|bf16", but(layer__bias=np.ones(3, np.float16)),
        encoding="bf16"),
    bad("indices without a need", "EXTRA_RESERVED", "enc|reserved", {**BASE, f"extra.enc.index.{B}": np.zeros(1, np.uint32)}),
]  # fmt: skip

LOSS = "extra.qfedavg.loss"
EXTRAS = [
    bad("an extra of a reserved namespace", "EXTRA_RESERVED", "extra.fl.x", {**BASE, "extra.fl.x": ONES}),
    bad("an extra that nobody wants", "EXTRA_UNKNOWN", f"{DC}|none", {**BASE, DC: ONES}),
    bad("an extra in the metadata's clothes", "EXTRA_UNKNOWN", "extra.|none", {**BASE, "extra.": ONES}),
    bad("no extra where one is needed", "EXTRA_MISSING", "extra.scaffold.dc|fl_client.Scaffold", BASE, "SCAFFOLD"),
    bad("an extra of a tensor that is not there", "EXTRA_UNKNOWN", "nobody", {**BASE, DC: ONES,
        "extra.scaffold.dc.nobody": ONES}, "SCAFFOLD"),
    bad("an extra of a counter", "EXTRA_UNKNOWN", N, {**BASE, DC: ONES, f"extra.scaffold.dc.{N}": BASE[N]}, "SCAFFOLD"),
    bad("an extra of another shape", "EXTRA_SHAPE", f"{DC}|[4]", {**BASE, DC: np.ones(4, np.float32)}, "SCAFFOLD"),
    bad("an extra of integers", "EXTRA_DTYPE", f"{DC}|I32", {**BASE, DC: np.ones(3, np.int32)}, "SCAFFOLD"),
    bad("an extra with infinity", "NON_FINITE", DC, {**BASE, DC: filled(np.inf)}, "SCAFFOLD"),
    bad("a double extra beyond float", "NON_FINITE", "scaffold.dc", {**BASE, DC: filled(1e300, np.float64)}, "SCAFFOLD"),
    bad("a number that is negative", "EXTRA_RANGE", f"{LOSS}|-1.0|at least 0", {**BASE, LOSS: np.array(-1.0)}, "qFedAvg"),
    bad("two numbers for one", "EXTRA_SHAPE", f"{LOSS}|[2]", {**BASE, LOSS: np.ones(2)}, "qFedAvg"),
    bad("an integer for a number", "EXTRA_SHAPE", f"{LOSS}|I64", {**BASE, LOSS: np.array(3)}, "qFedAvg"),
    bad("a number that is NaN", "NON_FINITE", LOSS, {**BASE, LOSS: np.array(np.nan)}, "qFedAvg"),
    bad("a number for each tensor", "EXTRA_UNKNOWN", LOSS, {**BASE, f"{LOSS}.{B}": np.array(1.0)}, "qFedAvg"),
    case("no steps where they count", 422, "NUM_STEPS_MISSING", "FedNova|num_steps", *sent(lambda: HONEST),
         to="FedNova"),
]  # fmt: skip

CASES = [*TENSORS, *ORDER, *KINDS, *ENCODINGS, *EXTRAS]
