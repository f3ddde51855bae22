"""Extras into one file of flat vectors, and a dictionary of numbers."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from fl_server_ai.aggregation import Extra
from fl_server_ai.aggregation.dtypes import FLOAT_DTYPES
from fl_server_ai.aggregation.flat import FloatRun, float_runs
from fl_server_ai.containers import DTYPE_BYTES, Manifest, TensorInfo
from fl_server_ai.containers.writing import write_canonical
from fl_server_ai.received.names import PREFIX, Parts
from fl_server_ai.received.numbers import BLOCK, FLOATS, blocks, narrowed, number, widened
from fl_server_core.exceptions import Unusable


def numbers_of(source: Path, parts: Parts, extras: Sequence[Extra]) -> dict[str, float]:
    """The extras that are numbers; finite already. `Unusable` with the first that can't be used."""
    found = {}
    for extra in extras:
        info = parts.numbers.get(extra.name)
        if extra.per_tensor:
            continue
        if info is None:
            _missing(extra)
            continue
        name = PREFIX + extra.name
        if info.dtype not in FLOATS or math.prod(info.shape) != 1:
            raise Unusable(
                f"{name!r} must be one floating number, not {info.dtype} of shape "
                f"{list(info.shape)}",
                code="EXTRA_SHAPE",
                tensor=name,
            )
        value = number(source, info)
        _check_range(extra, name, value)
        found[extra.name] = value
    return found


def check_tensors(source: Path, parts: Parts, extras: Sequence[Extra]) -> None:
    """Raise `Unusable` with the first tensor of an extra that has a number out of range; all are finite."""
    with source.open("rb", buffering=0) as file:
        for extra in extras:
            for info in parts.tensors.get(extra.name, {}).values():
                for block in blocks(file, info):
                    values = widened(block, info.dtype)
                    for value in (values.min(), values.max()):
                        _check_range(extra, info.name, float(value))


def _check_range(extra: Extra, name: str, value: float) -> None:
    least, most = extra.limits
    if not least <= value <= most:
        said = f"at least {least:g}" if value < least else f"at most {most:g}"
        raise Unusable(f"{name!r} is {value!r}; it must be {said}", code="EXTRA_RANGE", tensor=name)


def _missing(extra: Extra) -> None:
    if extra.required:
        tail = ".<tensor>" if extra.per_tensor else ""
        raise Unusable(f"{PREFIX}{extra.name}{tail} is missing: {extra.doc}", code="EXTRA_MISSING")


def write_tensors(
    source: Path, parts: Parts, extras: Sequence[Extra], model: Manifest, target: Path
) -> str | None:
    """Write the per-tensor extras to `target`; the file's SHA-256, or None if none are wanted."""
    wanted = [extra.name for extra in extras if extra.per_tensor]
    for extra in extras:
        if extra.per_tensor:
            _check(extra, parts.tensors.get(extra.name, {}), model)
    runs = float_runs(model.tensors)
    if not wanted or not runs:
        return None
    vectors = {f"{name}.{index}": (name, run) for name in wanted for index, run in enumerate(runs)}
    layout = [(vector, run.beside, (run.count,)) for vector, (_, run) in vectors.items()]
    return write_canonical(
        target,
        layout,
        lambda vector: _vector(
            source, parts.tensors.get(vectors[vector][0], {}), vectors[vector][1]
        ),
    )


def _check(extra: Extra, sent: dict[str, TensorInfo], model: Manifest) -> None:
    if not sent:
        _missing(extra)
    floats = {tensor.name: tensor for tensor in model.tensors if tensor.dtype in FLOAT_DTYPES}
    for name, info in sent.items():
        if name not in floats:
            raise Unusable(
                f"{info.name!r}: the model has no float tensor {name!r}",
                code="EXTRA_UNKNOWN",
                tensor=info.name,
            )
        if info.shape != floats[name].shape:
            raise Unusable(
                f"{info.name!r} has shape {list(info.shape)}, {name!r} has "
                f"{list(floats[name].shape)}",
                code="EXTRA_SHAPE",
                tensor=info.name,
            )
        if info.dtype not in FLOATS:
            raise Unusable(
                f"{info.name!r} is {info.dtype}; extras are {', '.join(FLOATS)}",
                code="EXTRA_DTYPE",
                tensor=info.name,
            )


def _vector(source: Path, sent: dict[str, TensorInfo], run: FloatRun) -> Iterator[bytes]:
    with source.open("rb", buffering=0) as file:
        for tensor in run.tensors:
            info = sent.get(tensor.name)
            count = math.prod(tensor.shape)
            if info is None:
                for start in range(0, count, BLOCK):
                    yield bytes(min(BLOCK, count - start) * DTYPE_BYTES[run.beside])
                continue
            for block in blocks(file, info):
                yield narrowed(widened(block, info.dtype), run.beside)
