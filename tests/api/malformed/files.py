"""Containers that are damaged, and what is none; each comes in by all three doors."""

import gzip
import io
import json
import pickle
import struct
import zipfile
from typing import Any

import numpy as np

from tests.ai.hostile.building import number, program, saved, scripted, state_dict, tensor, text
from tests.ai.hostile.headers import written
from tests.ai.hostile.npz import archive, described, npy
from tests.api.malformed.case import HONEST, case, sent
from tests.scenes import weights

F4 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
SCRIPT = scripted()


def zipped(**entries: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as out:
        for name, data in entries.items():
            out.writestr(name, data)
    return buffer.getvalue()


def npz(**arrays: Any) -> bytes:
    """What numpy writes, pickles included."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def header(change: Any) -> bytes:
    """The honest file with its header's JSON changed."""
    length = struct.unpack("<Q", HONEST[:8])[0]
    entries = json.loads(HONEST[8 : 8 + length])
    change(entries)
    return written(entries, HONEST[8 + length :])


def many() -> bytes:
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    return written({str(i): empty for i in range(20_001)})


NO_CONTAINER = "UNKNOWN_CONTAINER"
CASES = [
    case("an empty file", 415, NO_CONTAINER, "empty", *(sent(lambda: b"")[:2] * 2)[:3]),
    case("bytes of nothing", 415, NO_CONTAINER, "safetensors|npz|torch.save", *sent(lambda: b"x" * 99)),
    case("a page that says Not Found", 415, NO_CONTAINER, "", *sent(lambda: b"<!doctype html><title>404</title>")),
    case("a bare pickle", 415, NO_CONTAINER, "", *sent(lambda: pickle.dumps([1]))),
    case("a bare .npy", 415, NO_CONTAINER, "", *sent(lambda: npy("{'descr': '<f4', 'fortran_order': False, 'shape': (4,), }\n"))),
    case("a packed safetensors file", 415, NO_CONTAINER, "", *sent(lambda: gzip.compress(HONEST))),
    case("a zip of a text", 422, "BAD_CONTAINER", "readme|.npy", *sent(lambda: zipped(readme=b"hello"))),
    case("a zip of nothing", 422, "KEY_MISMATCH", "missing", *sent(lambda: zipped())),
    case("safetensors, a byte short", 422, "BAD_CONTAINER", "end at byte", *sent(lambda: HONEST[:-1])),
    case("safetensors, a byte long", 422, "BAD_CONTAINER", "end at byte", *sent(lambda: HONEST + b"\0")),
    case("safetensors, cut in its header", 422, "BAD_CONTAINER", "header claims", *sent(lambda: HONEST[:60])),
    case("safetensors with a header that is no JSON", 422, "BAD_CONTAINER", "JSON", *sent(lambda: written(b"{x}     "))),
    case("safetensors with tensors in one place", 422, "BAD_CONTAINER", "overlap",
         *sent(lambda: written({"a": F4, "b": F4}, bytes(4)))),
    case("safetensors with a size that is a fraction", 422, "BAD_CONTAINER", "layer.bias|shape",
         *sent(lambda: header(lambda e: e["layer.bias"].update(shape=[3.0])))),
    case("safetensors with a shape that needs more", 422, "BAD_CONTAINER", "layer.bias|bytes",
         *sent(lambda: header(lambda e: e["layer.bias"].update(shape=[4])))),
    case("safetensors of an unknown dtype", 422, "BAD_CONTAINER", "layer.bias|F128",
         *sent(lambda: header(lambda e: e["layer.bias"].update(dtype="F128")))),
    case("safetensors with metadata that is a number", 422, "BAD_CONTAINER", "string",
         *sent(lambda: header(lambda e: e.update(__metadata__={"kind": 1})))),
    case("safetensors with a header of seventeen megabytes", 422, "HEADER_TOO_LARGE", "16,777,216",
         *sent(lambda: written(b"{" + b" " * (17 * 2**20)))),
    case("safetensors of twenty thousand and one tensors", 422, "TOO_MANY_TENSORS", "20,000", *sent(many)),
    case("npz, cut", 422, "BAD_CONTAINER", "", *sent(lambda: npz(**weights(1.0))[:-30])),
    case("npz of objects", 422, "BAD_CONTAINER", "w", *sent(lambda: npz(w=np.array([{}], object)))),
    case("npz of texts", 422, "BAD_CONTAINER", "w", *sent(lambda: npz(w=np.array(["a"])))),
    case("npz of dates", 422, "BAD_CONTAINER", "w", *sent(lambda: npz(w=np.array(["2026-01-01"], "M8[D]")))),
    case("npz whose header calls a function", 422, "BAD_CONTAINER", "w",
         *sent(lambda: archive(npy("__import__('os').getcwd()\n")))),
    case("npz of a negative size", 422, "BAD_CONTAINER", "w", *sent(lambda: described("'<f4'", shape="(-4,)"))),
    case("npz with other tensors", 422, "KEY_MISMATCH", "layer.bias", *sent(lambda: npz(w=np.zeros(4, np.float32)))),
    case("npz with NaN", 422, "NON_FINITE", "layer.bias",
         *sent(lambda: npz(**{**weights(1.0), "layer.bias": np.full(3, np.nan, np.float32)}))),
    case("npz of extended floats", 422, "BAD_CONTAINER", "layer.bias",
         *sent(lambda: npz(**{**weights(1.0), "layer.bias": np.zeros(3, np.longdouble)}))),
    case("torch.save of other tensors", 422, "KEY_MISMATCH", "layer.bias", *sent(lambda: saved(state_dict()))),
    case("torch.save of a checkpoint", 422, "NOT_A_STATE_DICT", "epoch", *sent(lambda: saved(state_dict(epoch=number(3))))),
    case("torch.save of a number", 422, "NOT_A_STATE_DICT", "", *sent(lambda: saved(number(3)))),
    case("torch.save with NaN", 422, "KEY_MISMATCH", "layer.bias",
         *sent(lambda: saved(state_dict(), {"0": struct.pack("<4f", *[float("nan")] * 4)}))),
    case("torch.save that calls os.system", 422, "HOSTILE_PICKLE", "os.system",
         *sent(lambda: saved(b"cos\nsystem\n" + text("true") + b"\x85R"))),
    case("torch.save without its storage", 422, "BAD_CONTAINER", "0", *sent(lambda: saved(state_dict(), {}))),
    case("torch.save of a tensor beyond its storage", 422, "BAD_CONTAINER", "",
         *sent(lambda: saved(state_dict(v=tensor(None, number(2)))))),
    case("torch.save of a sparse tensor", 422, "UNSUPPORTED_TENSOR", "",
         *sent(lambda: saved(state_dict(v=tensor(rebuild="_rebuild_sparse_tensor"))))),
    case("torch.save of a program without end", 422, "HOSTILE_PICKLE", "",
         *sent(lambda: zipped(**{"archive/data.pkl": program(b"")[:-1], "archive/version": b"3\n"}))),
    case("TorchScript, cut", 422, "BAD_CONTAINER", "", *sent(lambda: SCRIPT[: len(SCRIPT) // 2])),
    case("TorchScript of other tensors", 422, "KEY_MISMATCH", "layer.bias", *sent(lambda: SCRIPT)),
    case("TorchScript that writes files", 422, "FORBIDDEN_OPERATOR", "save",
         *sent(lambda: scripted("class Net(Module):\n  __parameters__ = [\"w\", ]\n  w : Tensor\n"
                                "  def forward(self: __torch__.Net) -> Tensor:\n"
                                "    torch.save(self.w, \"/tmp/x\")\n    return self.w\n"))),
]  # fmt: skip
