"""`stats` of a model's metadata: parameters per layer, and of programs that could be run shapes and multiply-adds.

Fields as torchinfo has them. What is not known is null: weights alone don't tell classes, nor what is trained.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal, NamedTuple

from fl_server_ai.containers import DTYPE_BYTES, Manifest, read_manifest
from fl_server_ai.dispatch import dispatch_inference
from fl_server_ai.sandbox.descriptions import Description, Layer
from fl_server_ai.services.models import PROGRAMS
from fl_server_ai.uncertainty.options import CommonOptions
from fl_server_core.lifecycle import EventState
from fl_server_core.models import GlobalModel, InferenceJob, User
from fl_server_core.models.inference import JobKind
from fl_server_core.models.weights import ModelType
from fl_server_core.services.inference import job_create, job_error
from fl_server_core.services.statistics import statistics_store, statistics_want
from fl_server_core.storage import has_paths, local_path

VERSION = "1"  # of what is counted; another one is counted anew
Row = dict[str, Any]


class Statistics(NamedTuple):
    """`stats` is null unless `state` is done; `error` says why it failed."""

    stats: dict[str, Any] | None
    state: Literal["done", "pending", "failed", "none"]
    error: str | None = None


def model_statistics(*, model: GlobalModel, user: User) -> Statistics:
    """What is known; the first to ask starts the counting of a program. Call it again while it is pending."""
    if model.type == ModelType.MEAN:
        return Statistics(None, "none", "a MEAN model has no layers of its own; ask its members")
    if model.awaits_weights:
        return Statistics(None, "none", "this model has no weights yet")
    row = model.statistics
    if row is None or (row.result is None and row.job is None):
        if model.container not in PROGRAMS and has_paths():
            found = weights_manifest(model)
            key = _key(found.header_bytes.hex())
            row = statistics_store(model=model, key=key, result=of_weights(found))
        else:  # a program to run, or a file that has to be fetched whole: work for a worker
            key = _key(*_seen(model))
            row = statistics_want(model=model, key=key, create=lambda: _job(model, user))
    if row.result is not None:
        return Statistics(row.result, "done")
    if row.job is not None and row.job.state == EventState.FAILED:
        error = job_error(row.job)
        return Statistics(None, "failed", f"{error.error_code}: {error.detail}")
    return Statistics(None, "pending")


def weights_manifest(model: GlobalModel) -> Manifest:
    """Of its stored weights; a storage without paths gives the whole file for it."""
    with local_path(model.weights.blob) as path:
        return read_manifest(path)


def _seen(model: GlobalModel) -> tuple[str, ...]:
    """What the statistics of this model depend on, as far as rows tell."""
    if model.template is None or model.container not in PROGRAMS:
        return ("weights", model.weights.blob.digest)
    return (model.template.digest, model.container, json.dumps(model.input_shape))


def _job(model: GlobalModel, user: User) -> InferenceJob:
    job = job_create(
        user=user, model=model, local_model=None, weights=model.weights.blob,
        kind=JobKind.STATISTICS, method="NONE", options=asdict(CommonOptions()),
        return_format="json", data=None, file=None,
    )  # fmt: skip
    dispatch_inference(job.pk)
    return job


def _key(*parts: str) -> str:
    return hashlib.sha256(json.dumps([VERSION, *parts]).encode()).hexdigest()


def of_weights(manifest: Manifest) -> dict[str, Any]:
    """From names and shapes alone: numbers per dotted prefix, buffers among them."""
    own: dict[str, Row] = {}
    for tensor in manifest.tensors:
        path = tensor.name.rpartition(".")[0]
        row = own.setdefault(path, {"params": 0, "bytes": 0})
        row["params"] += math.prod(tensor.shape)
        row["bytes"] += tensor.nbytes
    rows = [
        Layer(path, "", own.get(path, {}).get("params", 0), 0, own.get(path, {}).get("bytes", 0),
              0, None, None, None, None, None, ran=False)
        for path in _with_parents(own)
    ]  # fmt: skip
    # Nobody says which of them are buffers.
    sizes = sum(tensor.nbytes for tensor in manifest.tensors)
    found = _totals(rows, (manifest.num_params, None, sizes), None)
    for entry in found["summary_list"]:
        entry |= {"trainable_params": None, "executed": None}
    return found


def of_program(described: Description, input_shape: Sequence[int | None] | None) -> dict[str, Any]:
    """From what the sandbox has seen of a program."""
    shape = run_shape(input_shape) if described.ran else None
    found = _totals(described.layers, described.counted, shape)
    if shape is not None and described.ran is not None:
        found["total_input"] = math.prod(shape) * DTYPE_BYTES[described.ran]
        found["total_mult_adds"] = described.macs
        found["total_output_bytes"] = sum(layer.size or 0 for layer in described.layers)
        found["output_bytes"] = described.output
    else:
        for entry in found["summary_list"]:
            entry["executed"] = None
    found["run_failed"] = described.failed
    return found


def run_shape(input_shape: Sequence[int | None] | None) -> list[int] | None:
    """The shape of the zeros that a program is run with: 1 where any size will do."""
    return None if not input_shape else [size or 1 for size in input_shape]


def _totals(
    layers: Sequence[Layer], counted: tuple[int, int | None, int], shape: list[int] | None
) -> dict[str, Any]:
    sums = {layer.path: [0, 0, 0] for layer in layers}
    for layer in layers:
        for path in _ancestors(layer.path):
            for index, count in enumerate((layer.params, layer.trainable, layer.nbytes)):
                sums[path][index] += count
    parents = {path.rpartition(".")[0] for path in sums if path}
    places: dict[int, int] = {}
    rows = []
    for index, layer in enumerate(layers):
        depth = layer.path.count(".") + 1 if layer.path else 0
        places[depth] = places.get(depth, 0) + 1
        rows.append(_entry(index, layer, sums[layer.path], depth, places[depth], parents))
    return {
        "input_size": None if shape is None else [shape],
        "total_input": None,
        "total_mult_adds": None,
        "total_output_bytes": None,
        "total_param_bytes": counted[2],
        "total_params": counted[0],
        "trainable_params": counted[1],
        "summary_list": rows,
    }


def _entry(
    index: int, layer: Layer, total: list[int], depth: int, place: int, parents: set[str]
) -> Row:
    shared = bool(layer.params) and layer.shared == layer.params
    return {
        "layer_id": index,
        "class_name": layer.kind or None,
        "depth": depth,
        "depth_index": place,
        "executed": layer.ran,
        "var_name": layer.path.rpartition(".")[2],
        "path": layer.path,
        "is_leaf_layer": layer.path not in parents,
        "contains_lazy_param": False,
        "is_recursive": shared,
        "input_size": None if layer.given is None else list(layer.given),
        "output_size": None if layer.output is None else list(layer.output),
        "kernel_size": None if layer.kernel is None else list(layer.kernel),
        "trainable_params": total[1],
        "num_params": total[0],
        "param_bytes": total[2],
        "output_bytes": layer.size,
        "macs": layer.macs,
    }


def _ancestors(path: str) -> list[str]:
    """The path itself, and all that hold it, up to the model."""
    parts = path.split(".") if path else []
    return [".".join(parts[:count]) for count in range(len(parts) + 1)]


def _with_parents(paths: Any) -> list[str]:
    return list(dict.fromkeys(part for path in paths for part in _ancestors(path)))
