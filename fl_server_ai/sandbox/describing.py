"""What a program is made of: its layers and their parameters, and what one run with zeros shows of them.

Script modules take no hooks, and an exported program has no modules any more. A dispatch mode sees the operators of
both: one that takes a layer's own weight belongs to that layer. Shapes are those of whole operators (`linear`); then,
in a second run, multiplications are counted in what these are made of (`addmm`). What can't be told so is None.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fl_server_ai.sandbox.drawing import DTYPES, NAMES, first_tensor
from fl_server_ai.sandbox.loading import Model
from fl_server_ai.sandbox.pipes import Pipes

LAYERS = 20_000
NAME = 512  # characters
_SHAPED = """linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution batch_norm
    layer_norm group_norm instance_norm embedding prelu bilinear rms_norm _native_batch_norm_legit_no_training
    native_layer_norm native_group_norm addmm"""
SHAPED = frozenset(_SHAPED.split())  # their output is that of the layer whose weight they take
# Multiplications inside that no formula here counts.
_OPAQUE = """lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell mkldnn_rnn_layer _trilinear
    _native_multi_head_attention _transformer_encoder_layer_fwd _cdist_forward _euclidean_dist addmv mv dot
    addbmm addr conv_tbc vdot quantized_lstm quantized_gru _thnn_fused_lstm_cell _thnn_fused_gru_cell"""
OPAQUE = frozenset(_OPAQUE.split())


def describe(model: Model, shape: list[int], pipes: Pipes) -> None:
    """Answer with a JSON text as the bytes of one tensor; an empty shape: without a run."""
    rows = {path: _row(path, name) for path, name in _paths(model)}
    seen: set[int] = set()
    owners: dict[int, str] = {}
    total: list[Tensor] = []
    for name, parameter in model.parameters():
        path = name.rpartition(".")[0]
        row = rows[path]
        row["params"] += parameter.numel()
        row["trainable"] += parameter.numel() if parameter.requires_grad else 0
        row["bytes"] += parameter.numel() * parameter.element_size()
        place = parameter.untyped_storage().data_ptr()
        if place in seen:
            row["shared"] += parameter.numel()
        elif parameter.numel():
            seen.add(place)
            owners[place] = path
            total.append(parameter)
    found = {
        "layers": list(rows.values()), "ran": None, "failed": None, "output": 0, "macs": None,
        "params": sum(t.numel() for t in total),
        "trainable": sum(t.numel() for t in total if t.requires_grad),
        "bytes": sum(t.numel() * t.element_size() for t in total),
    }  # fmt: skip
    if shape:
        _run(model, shape, owners, rows, found)
    text = json.dumps(found).encode("utf-8", "replace")
    pipes.send({"described": True, "tensors": [["", "U8", [len(text)]]]}, memoryview(text))


def _row(path: str, name: str) -> dict[str, Any]:
    return {
        "path": path, "class": name[:NAME], "params": 0, "trainable": 0, "bytes": 0, "shared": 0,
        "input": None, "output": None, "kernel": None, "macs": None, "size": None, "ran": False,
    }  # fmt: skip


def _paths(model: Model) -> Iterator[tuple[str, str]]:
    """Every layer's path and class, and each of them after the one that holds it."""
    names = dict(model.layers())
    wanted = [*names, *(name.rpartition(".")[0] for name, _ in model.parameters())]
    done: set[str] = set()
    for path in wanted:
        parts = path.split(".") if path else []
        for count in range(len(parts) + 1):
            part = ".".join(parts[:count])[:NAME]
            if part not in done and len(done) < LAYERS:
                done.add(part)
                yield part, names.get(part, "")


def _run(
    model: Model,
    shape: list[int],
    owners: Mapping[int, str],
    rows: Mapping[str, dict[str, Any]],
    found: dict[str, Any],
) -> None:
    device = next((t.device for t in model.state().values()), torch.device("cpu"))
    for dtype in ("F32", "I64"):  # pictures and tables, or tokens
        zeros = torch.zeros(shape, dtype=DTYPES[dtype], device=device)
        try:
            with torch.inference_mode(), _Shapes(owners, rows):
                output = first_tensor(model.run((zeros.clone(),)))
            with torch.no_grad(), _Products(owners, rows) as products:
                model.run((zeros.clone(),))
        except Exception as error:  # noqa: BLE001 - whatever the program raises; the other dtype may do
            found["failed"] = found["failed"] or f"{type(error).__name__}: {error}"[:500]
            continue
        found["ran"], found["failed"] = dtype, None
        found["macs"] = products.total
        if output is not None and output.dtype in NAMES:
            found["output"] = output.numel() * output.element_size()
        return


@dataclass(frozen=True)
class _Seen:
    """One operator that has run: its tensors, those of them that are the program's own, and their layer's row."""

    name: str
    namespace: str
    args: Any
    tensors: list[Tensor]
    weights: list[Tensor]
    row: dict[str, Any] | None
    result: Any


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, owners: Mapping[int, str], rows: Mapping[str, dict[str, Any]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.owners = owners
        self.rows = rows

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return (
            False  # or torch imports its compiler at the first operator, when no file can be opened
        )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [a for a in [*args, *(kwargs or {}).values()] if isinstance(a, Tensor)]
        owned = [(t, self.owners.get(t.untyped_storage().data_ptr())) for t in tensors]
        row = self.rows.get(next((path for _, path in owned if path is not None), ""))
        mine = row if any(path is not None for _, path in owned) else None
        weights = [t for t, path in owned if path is not None]
        name, space = func.overloadpacket.__name__, func.namespace
        self.saw(_Seen(name, space, args, tensors, weights, mine, result))
        return result

    def saw(self, seen: _Seen) -> None:
        raise NotImplementedError


class _Shapes(_Watch):  # type: ignore[no-untyped-call]
    def saw(self, seen: _Seen) -> None:
        row, weights = seen.row, seen.weights
        if row is None:
            return
        row["ran"] = True
        output = seen.result if isinstance(seen.result, Tensor) else first_tensor(seen.result)
        given = next((t for t in seen.tensors if not any(t is w for w in weights)), None)
        if seen.name not in SHAPED or output is None or given is None:
            return
        row["input"], row["output"] = list(given.shape), list(output.shape)
        row["size"] = output.numel() * output.element_size()
        if "conv" in seen.name:
            row["kernel"] = list(weights[0].shape[2:])


class _Products(_Watch):  # type: ignore[no-untyped-call]
    """Multiply-adds of convolutions and matrix products; `total` is None once there is one that is not known."""

    total: int | None = 0

    def saw(self, seen: _Seen) -> None:
        row = seen.row
        if seen.name in OPAQUE or seen.namespace not in {"aten", "prim"}:
            self.total = None
            if row is not None:
                row["macs"] = None
            return
        count = products(seen.name, seen.args, seen.tensors, seen.result)
        if count is None:
            return
        if self.total is not None:
            self.total += count
        if row is not None:
            row["macs"] = (row["macs"] or 0) + count


def products(name: str, args: Any, tensors: list[Tensor], result: Any) -> int | None:
    """Multiply-adds of one operator from its tensors; None for one that has no products of this kind."""
    shapes = [t.shape for t in tensors]
    match name:
        case "convolution" | "_convolution":
            # Transposed: every number of the input is spread over the kernel.
            spread = shapes[0] if args[6] else result.shape
            return math.prod(spread) * math.prod(shapes[1][1:])
        case "mm" | "bmm":
            return math.prod(shapes[0]) * shapes[1][-1]
        case "addmm" | "baddbmm" | "_addmm_activation":
            return math.prod(shapes[1]) * shapes[2][-1]
        case "linear" | "matmul":
            return int(result.numel()) * shapes[0][-1]
        case _ if name.startswith("_scaled_dot_product"):
            query, key, value = shapes[:3]
            return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
    return None
