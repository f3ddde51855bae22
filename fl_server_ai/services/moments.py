"""Taking in SWAG moments: read, check that some weights can have them, make them durable, commit, acknowledge."""

import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from fl_server_ai.containers import Manifest, TensorInfo, check_finite, read_manifest
from fl_server_ai.containers.writing import read_blocks
from fl_server_ai.services.intake import canonical_blob
from fl_server_ai.services.rounds import round_advance
from fl_server_ai.services.training_options import trainer_options
from fl_server_ai.services.updates import update_precheck
from fl_server_core.exceptions import KeyMismatch, ShapeMismatch, Unusable
from fl_server_core.killpoints import committing
from fl_server_core.models import GlobalModel, SwagMoments, Training, User
from fl_server_core.services.blobs import blob_discard
from fl_server_core.services.moments import combined_moments, moments_accept
from fl_server_core.services.rounds import sample_size_check
from fl_server_core.services.trainings import training_locked
from fl_server_core.storage import local_path

# How far second - first^2 may be below 0, relative to first^2: what averaging in this dtype can do.
ROUNDING = {"F64": 1e-12, "F32": 3e-5, "F16": 8e-3}
NUMPY: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
}
NUMBERS = 2**17  # in memory at once


def moments_submit(
    *,
    model_id: uuid.UUID | str,
    owner: User,
    round: int,
    sample_size: int,
    first: Path,
    second: Path,
    deviations: Path | None = None,
) -> tuple[SwagMoments, bool]:
    """Store one client's moments (arXiv:1902.02476) and whether they are new. As durable as an update.

    `first` and `second` hold the running means of w and of w*w by tensor name, in any container; what only
    `first` holds (buffers) is left alone. Raises `KeyMismatch`, `ShapeMismatch`, `NonFinite`, or `Unusable`
    (MOMENTS_INCONSISTENT) for a second moment below the square of the first.

    `deviations` holds w - mean of K steps for each tensor that has a second moment, in the shape (K, *shape);
    2 <= K <= the training's `swag_rank`, else `Unusable` (DEVIATIONS).
    """
    training = update_precheck(model_id=model_id, user=owner)
    sample_size_check(sample_size)
    with ExitStack() as stack:
        means, mean_blob, publish_means = stack.enter_context(canonical_blob(first, sha256=None))
        squares, square_blob, publish_squares = stack.enter_context(
            canonical_blob(second, sha256=None)
        )
        with local_path(training.base_version.blob) as base:
            _check_names(read_manifest(base), means, squares)
        check_finite(publish_means.path, means)
        check_finite(publish_squares.path, squares)
        _check_moments(publish_means.path, means, publish_squares.path, squares)
        columns_blob = None
        if deviations is not None:
            columns, columns_blob, publish_columns = stack.enter_context(
                canonical_blob(deviations, sha256=None)
            )
            _check_deviations(columns, squares, trainer_options(training).swag_rank)
            check_finite(publish_columns.path, columns)
            publish_columns()
        publish_means()
        publish_squares()
        try:
            with committing("moments.accept"):
                training = training_locked(training.pk)
                moments, created = moments_accept(
                    training=training, owner=owner, number=round, sample_size=sample_size,
                    first=mean_blob, second=square_blob, deviations=columns_blob,
                )  # fmt: skip
                if created:
                    round_advance(training_id=training.pk)
        finally:
            for blob in (mean_blob, square_blob, columns_blob):
                if blob is not None:
                    blob_discard(blob=blob)  # unless a row names it by now
    return moments, created


def model_moments(model: GlobalModel) -> SwagMoments | None:
    """The newest combined moments of a model; None before its first SWAG round has ended."""
    training = Training.objects.filter(model=model).first()
    return combined_moments(training) if training else None


def _check_names(model: Manifest, means: Manifest, squares: Manifest) -> None:
    known = {info.name: info for info in model.tensors}
    first = {info.name: info for info in means.tensors}
    if not squares.tensors:
        raise KeyMismatch("there are no second moments")
    for info in squares.tensors:
        if info.name not in known or info.name not in first:
            where = "the global model" if info.name not in known else "first_moment_file"
            raise KeyMismatch(
                f"tensor {info.name!r} has a second moment, but is not in {where}", tensor=info.name
            )
    for info in [*means.tensors, *squares.tensors]:
        wanted = known.get(info.name)
        if wanted is None:
            raise KeyMismatch(f"the global model has no tensor {info.name!r}", tensor=info.name)
        if info.shape != wanted.shape:
            raise ShapeMismatch(
                f"tensor {info.name!r} has shape {list(info.shape)}, the global model has "
                f"{list(wanted.shape)}",
                tensor=info.name,
                expected=list(wanted.shape),
                got=list(info.shape),
            )


def _check_deviations(columns: Manifest, squares: Manifest, rank: int) -> None:
    shapes = {info.name: info.shape for info in squares.tensors}
    odd = sorted(shapes.keys() ^ {info.name for info in columns.tensors})
    if odd:
        raise KeyMismatch(
            f"deviations_file and second_moment_file must have the same tensors; {odd[0]!r} is in one only",
            tensor=odd[0],
        )
    wanted = (
        f"this training takes 2 to {rank}" if rank else "this training takes none (swag_rank 0)"
    )
    first = columns.tensors[0]
    count = first.shape[0] if first.shape else 0
    if not 2 <= count <= rank:
        raise Unusable(
            f"tensor {first.name!r} has {count} deviations; {wanted}", code="DEVIATIONS", rank=rank
        )
    for info in columns.tensors:
        expected = (count, *shapes[info.name])
        if info.shape != expected:
            raise ShapeMismatch(
                f"deviations of {info.name!r} have shape {list(info.shape)}, not {list(expected)}",
                tensor=info.name,
                expected=list(expected),
                got=list(info.shape),
            )
        if info.dtype not in NUMPY:
            raise Unusable(
                f"tensor {info.name!r}: deviations are float16, float32 or float64, not {info.dtype}",
                code="DEVIATIONS",
                tensor=info.name,
            )


def _check_moments(means_at: Path, means: Manifest, squares_at: Path, squares: Manifest) -> None:
    first = {info.name: info for info in means.tensors}
    for info in squares.tensors:
        for one in (first[info.name], info):
            if one.dtype not in NUMPY:
                raise Unusable(
                    f"tensor {info.name!r}: moments are float16, float32 or float64, not {one.dtype}",
                    code="MOMENTS_INCONSISTENT",
                    tensor=info.name,
                )
        pairs = zip(_numbers(means_at, first[info.name]), _numbers(squares_at, info), strict=True)
        done = 0
        slack = max(ROUNDING[first[info.name].dtype], ROUNDING[info.dtype])
        for mean, square in pairs:
            bad = mean * mean * (1 - slack) - np.finfo(np.float32).tiny > square
            if bad.any():
                index = done + int(np.argmax(bad))
                raise Unusable(
                    f"tensor {info.name!r}: the second moment at flat index {index} is below the square "
                    "of the first; send the running means of w and of w*w over the same steps",
                    code="MOMENTS_INCONSISTENT",
                    tensor=info.name,
                    index=index,
                )
            done += len(mean)


def _numbers(path: Path, info: TensorInfo) -> Iterator[np.ndarray[Any, Any]]:
    """A tensor as float64, in pieces of one length for every dtype."""
    kind = NUMPY[info.dtype]
    count = info.nbytes // kind.itemsize
    with path.open("rb", buffering=0) as file:
        for start in range(0, count, NUMBERS):
            size = min(NUMBERS, count - start) * kind.itemsize
            data = b"".join(
                bytes(block)
                for block in read_blocks(file, info.offset + start * kind.itemsize, size)
            )
            yield np.frombuffer(data, kind).astype(np.float64)
