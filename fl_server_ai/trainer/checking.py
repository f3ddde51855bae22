"""A strategy's own look at an update: one tensor in memory at a time, and an end to it whatever it does."""

import logging
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from django.conf import settings
from django.db import DatabaseError
from safetensors import safe_open
from torch import Tensor

from fl_server_ai.aggregation import Strategy, UpdateMeta
from fl_server_ai.aggregation.blocks import Draft, Source, layout_of
from fl_server_ai.aggregation.stored import Stored
from fl_server_ai.aggregation.strategy import Refused
from fl_server_ai.containers import check_finite, read_manifest
from fl_server_ai.trainer.time_limit import TookTooLong, time_limited
from fl_server_core.exceptions import Unusable

log = logging.getLogger("fl.celery")
MAX_REASON = 2_000


class Outcome(StrEnum):
    """What came of a check; BAD where it came to nothing itself."""

    KEPT = "kept"
    REPLACED = "replaced"
    REFUSED = "refused"
    BAD = "bad"


@dataclass(frozen=True)
class Checked:
    """`reason` is "CODE: sentence" for the owner; `digest` the sha256 (hex) of the file that takes the update's place."""

    outcome: Outcome
    reason: str = ""
    digest: str = ""


class _Wrong(Exception):
    """What the check gave back can't be used; the text is ours."""


def update_check(
    strategy: Strategy[Any],
    meta: UpdateMeta,
    original: Path,
    out: Path,
    seconds: float | None = None,
) -> Checked:
    """Ask `strategy.check`. Tensors that it gives back are written to `out`, in the original's form.

    Tensors are read when they are asked for, and those given back are asked for one by one: a lazy mapping needs no
    more than two of them in memory, and what the check itself keeps. It may take `seconds` (FL_CHECK_SECONDS), the
    writing included. A check that raises or takes longer is BAD; OSError, MemoryError and what the database raises
    are not the update's fault and go through.
    """
    who = f"{type(strategy).__name__}.check"
    limit = settings.FL_CHECK_SECONDS if seconds is None else seconds
    try:
        with time_limited(limit), ExitStack() as stack:
            found = strategy.check(meta, _InTime(original, stack, time.monotonic() + limit))
            if found is None:
                return Checked(Outcome.KEPT)
            if isinstance(found, Refused):
                return Checked(Outcome.REFUSED, str(found.reason)[:MAX_REASON])
            return Checked(Outcome.REPLACED, digest=_written(original, found, out))
    except (OSError, MemoryError, DatabaseError):
        raise
    except TookTooLong:
        log.warning("%s of an update of %s took more than %s s", who, meta.participant, limit)
        return Checked(Outcome.BAD, f"CHECK_TIMEOUT: {who} took more than {limit:g} s")
    except _Wrong as error:
        log.warning("%s of an update of %s: %s", who, meta.participant, error)
        return Checked(Outcome.BAD, f"CHECK_FAILED: {who} {error}")
    except Exception as error:
        log.exception("%s of an update of %s failed", who, meta.participant)
        return Checked(Outcome.BAD, f"CHECK_FAILED: {who} raised {type(error).__name__}")


class _InTime(Stored):
    """The update's tensors, until it is too late."""

    def __init__(self, path: Path, stack: ExitStack, until: float) -> None:
        super().__init__(path, stack)
        self._until = until

    def __getitem__(self, name: str) -> Tensor:
        if time.monotonic() > self._until:  # the only limit outside of a main thread
            raise TookTooLong
        return super().__getitem__(name)


def _written(original: Path, tensors: Mapping[str, Tensor], path: Path) -> str:
    if not isinstance(tensors, Mapping):
        raise _Wrong(f"gave back a {type(tensors).__name__}: None, Refused or tensors by name")
    source, draft = Source(original, "(checked)"), None
    try:
        layout = layout_of(source)
        if set(tensors) != {info.name for info in layout.tensors}:
            raise _Wrong("gave back other tensors than it got")
        draft = Draft(path, layout.header, layout.size)
        with safe_open(original, "pt") as before:
            for info in layout.tensors:
                raw = _bytes(info.name, tensors[info.name], before.get_tensor(info.name))
                draft.write(raw, info.offset)
        digest = draft.publish()
    finally:
        source.close()
        if draft is not None:
            draft.discard()
    try:
        check_finite(path, read_manifest(path))
    except Unusable as error:
        raise _Wrong(f"gave back: {error.detail}") from error
    return digest


def _bytes(name: str, given: object, was: Tensor) -> bytes | memoryview:
    if not isinstance(given, Tensor) or given.shape != was.shape or given.dtype != was.dtype:
        raise _Wrong(f"changed the shape or dtype of tensor {name!r}")
    flat = given.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else b""
