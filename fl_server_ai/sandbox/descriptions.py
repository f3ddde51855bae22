"""A program's layers as its child describes them: checked here, because the child is not to be trusted."""

import json
from dataclasses import dataclass
from typing import Any

from fl_server_ai.sandbox.errors import SandboxCrashed

LAYERS = 20_000
TEXT = 512  # characters
MOST = 2**62


@dataclass(frozen=True)
class Layer:
    """One module, by its dotted path. Counts are of its own parameters, not of those in its children.

    `shared`: numbers that another layer before it holds too. Shapes, `size` (bytes of the output) and `macs`
    (multiply-adds of convolutions and matrix products) are None where a run has not shown them.
    """

    path: str
    kind: str
    params: int
    trainable: int
    nbytes: int
    shared: int
    given: tuple[int, ...] | None
    output: tuple[int, ...] | None
    kernel: tuple[int, ...] | None
    macs: int | None
    size: int | None
    ran: bool


@dataclass(frozen=True)
class Description:
    """`counted`: numbers in parameters, those that are trained, and bytes; tied ones once. `ran`: dtype of the zeros that the program ran with, None if it did not; `failed` then says why."""

    layers: tuple[Layer, ...]
    counted: tuple[int, int, int]
    ran: str | None
    failed: str | None
    output: int
    macs: int | None


def parsed_description(raw: bytes) -> Description:
    """Raises `SandboxCrashed` for anything that the honest child does not say."""
    try:
        found = json.loads(raw)
        rows = found["layers"]
        layers = tuple(_layer(row) for row in rows[:LAYERS])
        return Description(
            layers=layers,
            counted=(
                _count(found["params"]),
                _count(found["trainable"]),
                _count(found["bytes"]),
            ),
            ran=None if found["ran"] is None else _text(found["ran"]),
            failed=None if found["failed"] is None else _text(found["failed"]),
            output=_count(found["output"]),
            macs=_maybe(found["macs"]),
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise SandboxCrashed("the program's process describes it by nonsense") from error


def _layer(row: Any) -> Layer:
    return Layer(
        path=_text(row["path"]),
        kind=_text(row["class"]),
        params=_count(row["params"]),
        trainable=_count(row["trainable"]),
        nbytes=_count(row["bytes"]),
        shared=_count(row["shared"]),
        given=_sizes(row["input"]),
        output=_sizes(row["output"]),
        kernel=_sizes(row["kernel"]),
        macs=_maybe(row["macs"]),
        size=_maybe(row["size"]),
        ran=row["ran"] is True,
    )


def _text(value: Any) -> str:
    if type(value) is not str or len(value) > TEXT:
        raise ValueError
    return "".join(char if char.isprintable() else "?" for char in value)


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= MOST:
        raise ValueError
    return value


def _maybe(value: Any) -> int | None:
    return None if value is None else _count(value)


def _sizes(value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    if type(value) is not list or len(value) > 64:
        raise ValueError
    return tuple(_count(size) for size in value)
