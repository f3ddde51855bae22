"""Uploading models and giving their weights back in the container that their owner uses."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fl_server_ai.containers import (
    check_finite,
    check_some,
    sniff,
    template_ties,
    write_back,
)
from fl_server_ai.containers.writing import write_canonical
from fl_server_ai.sandbox.programs import Kind
from fl_server_ai.services.intake import canonical_blob
from fl_server_ai.services.preprocessing import keep, preprocessing_blob
from fl_server_ai.services.renderings import rendering
from fl_server_core.exceptions import Conflict, NotPermitted
from fl_server_core.lifecycle import TaskKind, TaskState
from fl_server_core.models import Blob, GlobalModel, Task, User
from fl_server_core.models.weights import ModelType
from fl_server_core.services.blobs import blob_discard, blob_store
from fl_server_core.services.models import model_create
from fl_server_core.storage import local_path, needs_room, staging_path

SAFETENSORS = "safetensors"
# Containers that hold a program, and what the sandbox calls it.
PROGRAMS: Mapping[str, Kind] = {"torchscript": "torchscript", "torch_export": "exported"}


@dataclass(frozen=True)
class Rendered:
    """A file to send while the context lasts; `etag` is the SHA-256 of exactly these bytes."""

    path: Path
    etag: str
    size: int


@contextmanager
def model_prepared(
    *,
    owner: User,
    name: str,
    description: str,
    model_file: Path,
    sha256: str | None,
    round: int = 0,
    type: str = ModelType.GLOBAL,
    input_shape: list[int | None] | None = None,
    preprocessing_file: Path | None = None,
) -> Iterator[Callable[[], GlobalModel]]:
    """Check and store a model's files; the function that is given creates its rows.

    Apart, so that nobody waits for the database while gigabytes are read. Files without rows are deleted
    at the end. Its weights are checked like an update's.
    """
    if not (owner.actor or owner.is_superuser):
        raise NotPermitted("only an actor may upload models; ask the admin for that role")
    container = sniff(model_file)
    preprocessing = preprocessing_blob(preprocessing_file) if preprocessing_file else None
    stored: list[Blob] = [preprocessing] if preprocessing else []
    try:
        with canonical_blob(model_file, sha256=sha256) as (manifest, blob, publish):
            check_some(manifest)
            check_finite(publish.path, manifest)
            ties = template_ties(container, model_file)
            publish()
            stored.append(blob)
            template = None
            if ties is not None:  # such weights can only be written over a copy of the file itself
                template = keep(model_file, container, sha256)
                stored.append(template)
            yield partial(
                model_create,
                owner=owner,
                name=name,
                description=description,
                container=container,
                weights=blob,
                round=round,
                type=type,
                input_shape=input_shape,
                preprocessing=preprocessing,
                template=template,
                ties=ties or (),
            )
    finally:
        for blob in stored:  # unless they have rows by now
            blob_discard(blob=blob)


def model_announce(
    *, owner: User, name: str, description: str, input_shape: list[int | None] | None = None
) -> GlobalModel:
    """A model without weights: when its training starts, one of the clients is asked for them."""
    if not (owner.actor or owner.is_superuser):
        raise NotPermitted("only an actor may create models; ask the admin for that role")
    path = staging_path(".safetensors")
    blob = None
    try:
        digest = write_canonical(path, [], lambda name: ())
        blob = blob_store(source=path, digest=digest, size=path.stat().st_size)
        return model_create(
            owner=owner,
            name=name,
            description=description,
            container=SAFETENSORS,
            weights=blob,
            input_shape=input_shape,
            awaits_weights=True,
        )
    finally:
        path.unlink(missing_ok=True)
        if blob is not None:
            blob_discard(blob=blob)  # unless it has a row by now


def model_upload(**fields: Any) -> GlobalModel:
    """Store a new global model at once: `model_prepared`, and its rows."""
    with model_prepared(**fields) as create:
        return create()


def weights_for(*, model: GlobalModel, user: User) -> Blob:
    """What a user has to work with: the current weights, or those that his open part goes on from.

    In a daisy chain these are another's; in asynchronous modes they may be of an older version.
    """
    if model.awaits_weights:
        raise Conflict(
            "this model has no weights yet; a client is asked for them when its training starts",
            code="NO_WEIGHTS",
        )
    task = (
        Task.objects.filter(
            user=user,
            kind=TaskKind.TRAIN,
            state=TaskState.OPEN,
            round__training__model=model,
        )
        .select_related("continues__blob", "round__base_version__blob")
        .order_by("-created_at")
        .first()
    )
    if task is None:
        return model.weights.blob
    if task.continues is not None and task.continues.blob is not None:
        return task.continues.blob
    return task.round.base_version.blob


@contextmanager
def weights_open(*, model: GlobalModel, blob: Blob, container: str) -> Iterator[Rendered]:
    """Weights of a model as a file in `container`; one made from the stored form is kept for a while."""
    with local_path(blob) as canonical:
        if container == SAFETENSORS:
            yield Rendered(canonical, blob.digest, blob.size)
            return
        template = model.template if container == model.container else None
        kept = f"{template.digest[:16] if template else container}-{blob.digest}"

        def make(path: Path) -> None:
            with needs_room("the server's disk is full; ask for safetensors"):
                if template is None:
                    write_back(container, canonical, path)
                    return
                with local_path(template) as original:
                    write_back(container, canonical, path, original)

        with rendering(kept, make) as (path, digest):
            yield Rendered(path, digest, path.stat().st_size)
