"""What travels with a model to prepare its inputs: stored at upload, and what of it can be carried out."""

import hashlib
import os
import shutil
from pathlib import Path

from django.conf import settings

from fl_server_ai.containers import Limits, sniff
from fl_server_ai.preprocessing.pipeline import EXAMPLE, canonical_text
from fl_server_ai.preprocessing.reading import read_pipeline
from fl_server_ai.sandbox.programs import check_program
from fl_server_ai.services.intake import canonical_blob
from fl_server_core.exceptions import Unusable
from fl_server_core.models import Blob, GlobalModel, User
from fl_server_core.models.weights import ModelType
from fl_server_core.services.blobs import blob_discard, blob_store
from fl_server_core.services.models import preprocessing_set
from fl_server_core.storage import staging_path

PIPELINE, SCRIPT = "json", "torchscript"


def preprocessing_upload(*, model: GlobalModel, user: User, file: Path) -> None:
    """Replace a model's preprocessing. `preprocessing_blob` says what it may be.

    `Unusable` (MEMBERS_ONLY) for a MEAN model, where it would never be applied.
    """
    if model.type == ModelType.MEAN:
        raise Unusable(
            "a MEAN model has no preprocessing: each of its members prepares inputs by its own; upload it to them",
            code="MEMBERS_ONLY",
        )
    blob = preprocessing_blob(file)
    try:
        preprocessing_set(model=model, user=user, preprocessing=blob)
    except BaseException:
        blob_discard(blob=blob)
        raise


def preprocessing_blob(file: Path) -> Blob:
    """Store an uploaded file, which is gone after; the row is unsaved.

    A pipeline, or torchvision's transforms, as canonical JSON; a TorchScript module with allowed operators as it is.
    Tensors in a known container are kept as they came, too, but nothing can be asked with them.
    """
    limits = Limits(file_bytes=settings.FL_MAX_MODEL_BYTES)
    pipeline = read_pipeline(file, limits)
    if pipeline is not None:
        file.write_bytes(canonical_text(pipeline))
        return keep(file, PIPELINE, None)
    container = sniff(file)
    if container == SCRIPT:
        check_program(file, "torchscript", limits)
    copy = staging_path(f".{container}")
    try:
        shutil.copyfile(file, copy)
        with canonical_blob(file, sha256=None):  # reads it whole and refuses what is no container
            pass
        return keep(copy, container, None)
    finally:
        copy.unlink(missing_ok=True)


def kind_of(blob: Blob) -> str:
    """What a stored preprocessing is: PIPELINE, SCRIPT or the container of its tensors."""
    return blob.name.rpartition(".")[2]


def check_usable(blob: Blob) -> None:
    """Raise `Unusable` (PREPROCESSING_NOT_RUNNABLE) for one that can only be downloaded."""
    if kind_of(blob) not in (PIPELINE, SCRIPT):
        raise Unusable(
            f"the model's preprocessing is a {kind_of(blob)} file of tensors, which can't be applied to inputs; "
            "replace it with POST models/<id>/preprocessing/ by a TorchScript module or by a pipeline such "
            f"as {EXAMPLE}",
            code="PREPROCESSING_NOT_RUNNABLE",
        )


def keep(file: Path, container: str, sha256: str | None) -> Blob:
    """Move a file into the storage as it came."""
    with file.open("rb") as handle:
        digest = sha256 or hashlib.file_digest(handle, "sha256").hexdigest()
        os.fsync(handle.fileno())
        size = os.fstat(handle.fileno()).st_size
    return blob_store(source=file, digest=digest, size=size, suffix=f".{container}")
