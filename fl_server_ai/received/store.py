"""Everything that is done with an update's file before it may be stored; the database is not asked."""

import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from fl_server_ai.aggregation import Strategy
from fl_server_ai.aggregation.dtypes import FLOAT_DTYPES
from fl_server_ai.containers import (
    Manifest,
    check_against,
    check_finite,
    check_ties,
    read_manifest,
)
from fl_server_ai.received.extras import check_tensors, numbers_of, write_tensors
from fl_server_ai.received.form import Form
from fl_server_ai.received.names import Parts, parts_of
from fl_server_ai.received.numbers import blocks, is_mask
from fl_server_ai.received.wanted import Wanted
from fl_server_ai.received.weights import Decoder, check_names
from fl_server_core.exceptions import Unusable

CODED = ("int8", "qsgd", "topk")


@dataclass(frozen=True)
class Written:
    """A synced file with its SHA-256 (hexadecimal)."""

    path: Path
    digest: str

    @property
    def size(self) -> int:
        return self.path.stat().st_size


@dataclass(frozen=True)
class Received:
    """What is to be stored. Files lie in staging; `tensors` are those that were sent, None if all."""

    weights: Written
    extras: Written | None = None
    mask: Written | None = None
    numbers: Mapping[str, float] = field(default_factory=dict)
    tensors: list[str] | None = None

    @property
    def files(self) -> list[Written]:
        """All that is there, in the order weights, extras, mask."""
        return [one for one in (self.weights, self.extras, self.mask) if one is not None]

    def identity(self, num_steps: int | None) -> str:
        """SHA-256 over all that came beside the weights; empty if nothing did."""
        said = {
            "extras": self.extras and self.extras.digest,
            "mask": self.mask and self.mask.digest,
            "numbers": dict(self.numbers) or None,
            "tensors": self.tensors,
            "num_steps": num_steps,
        }
        told = {key: value for key, value in said.items() if value is not None}
        return sha256(json.dumps(told, sort_keys=True).encode()).hexdigest() if told else ""


def receive(
    *,
    sent: Written,
    manifest: Manifest,
    form: Form,
    base: Path,
    wanted: Wanted,
    ties: Iterable[Iterable[str]],
    staged: Callable[[], Path],
    stack: ExitStack,
) -> Received:
    """Check an update and bring it into the form that is aggregated. `sent` is in canonical form.

    Files that are made are at paths of `staged()`; those that are still there when `stack` closes are
    deleted. Raises `Unusable`, always with the tensor's name where there is one.
    """
    model = read_manifest(base)
    names = {tensor.name for tensor in model.tensors}
    parts = parts_of(manifest, names, wanted.extras, coded=_has_coding(form))
    trained = {name for name in names if name in wanted.patterns}
    plain = (form.kind, form.encoding) in (("full", "none"), ("gradient", "none"))
    if form.kind == "full" and plain and trained == names and wanted.strategy.takes != "mask":
        check_against(_only(parts, manifest), model)
    else:
        check_names(set(parts.weights), model, trained=trained, form=form)
    check_finite(sent.path, manifest)

    def new() -> Path:
        path = staged()
        stack.callback(path.unlink, missing_ok=True)
        return path

    numbers = numbers_of(sent.path, parts, wanted.extras)
    extras_at = new()
    extras = write_tensors(sent.path, parts, wanted.extras, model, extras_at)
    if extras is not None:
        check_finite(extras_at, read_manifest(extras_at))
        check_tensors(sent.path, parts, wanted.extras)
    if wanted.strategy.takes == "mask":
        _check_mask(sent.path, parts)
    weights, mask = sent, None
    if manifest.header_bytes != model.header_bytes or not plain:
        decoder = Decoder(sent.path, form, parts, base, model)
        whole = new()
        weights = Written(whole, decoder.write(whole))
        check_finite(whole, read_manifest(whole))
        if decoder.holes:
            masked = new()
            mask = Written(masked, decoder.write_mask(masked))
    check_ties(weights.path, read_manifest(weights.path), ties)
    partial = form.kind in ("subset", "sparse") and set(parts.weights) != trained
    _check_whole(wanted.strategy, partial=partial, holes=mask is not None)
    return Received(
        weights,
        None if extras is None else Written(extras_at, extras),
        mask,
        numbers,
        None if set(parts.weights) == names or form.kind == "gradient" else sorted(parts.weights),
    )


def _has_coding(form: Form) -> bool:
    return form.encoding in CODED or form.kind == "sparse"


def _only(parts: Parts, manifest: Manifest) -> Manifest:
    """The weights of a file; its header is the model's if there is nothing else in it."""
    if len(parts.weights) == len(manifest.tensors):
        return manifest
    return Manifest(tuple(parts.weights.values()), manifest.data_offset, manifest.total_bytes, b"")


def _check_whole(strategy: Strategy[object], *, partial: bool, holes: bool) -> None:
    """Rules that weigh whole updates need whole updates."""
    name = type(strategy).__name__
    if (partial or holes) and not strategy.by_number:
        raise Unusable(
            f"{name} weighs updates as a whole; send all tensors that this training is about",
            code="PARTIAL_NOT_TAKEN",
        )
    if holes and type(strategy).reduce is not Strategy.reduce:
        raise Unusable(
            f"{name} takes tensors that are left out, but not single numbers; send kind subset",
            code="PARTIAL_NOT_TAKEN",
        )


def _check_mask(path: Path, parts: Parts) -> None:
    with path.open("rb", buffering=0) as file:
        for info in parts.weights.values():
            if info.dtype not in FLOAT_DTYPES:
                continue
            for block in blocks(file, info):
                if not is_mask(block, info.dtype):
                    raise Unusable(
                        f"tensor {info.name!r}: this strategy takes masks of zeros and ones",
                        code="NOT_A_MASK",
                        tensor=info.name,
                    )
