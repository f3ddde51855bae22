"""MEAN models: ensembles of models that are asked together (arXiv:1612.01474)."""

import uuid
from collections.abc import Sequence

from django.db import transaction

from fl_server_ai.services.inference import subject_of
from fl_server_ai.services.tensor_bytes import packed, stored
from fl_server_core.exceptions import Invalid, NotPermitted
from fl_server_core.models import GlobalModel, User
from fl_server_core.models.weights import ModelType
from fl_server_core.services.blobs import blob_discard
from fl_server_core.services.ensembles import Chosen, members_add
from fl_server_core.services.models import model_create

MAX_MEMBERS = 100


def mean_create(
    *,
    owner: User,
    name: str,
    description: str,
    models: Sequence[uuid.UUID],
    weights: Sequence[float] = (),
    input_shape: list[int | None] | None = None,
) -> GlobalModel:
    """An ensemble of global and local models that the owner sees; equal weights if none are given.

    Global models are asked with the weights that they have at that time; a local one's file is kept as
    long as the ensemble, whatever its training does with it.
    """
    if not (owner.actor or owner.is_superuser):
        raise NotPermitted("only an actor may upload models; ask the admin for that role")
    if not 1 <= len(models) <= MAX_MEMBERS or len(set(models)) < len(models):
        raise _bad("models", f"a MEAN model has 1 to {MAX_MEMBERS} different models")
    if weights and (len(weights) != len(models) or min(weights) <= 0):
        raise _bad("weights", "one number above 0 for each of the models")
    members = [subject_of(user=owner, model_id=pk) for pk in models]
    for member in members:
        if member.model.type == ModelType.MEAN:
            raise _bad(
                "models", "members are global or local models, and none of them of type MEAN"
            )
    blob = stored(packed([]))
    try:
        with transaction.atomic():
            mean = model_create(
                owner=owner, name=name, description=description, container="safetensors",
                weights=blob, type=ModelType.MEAN, input_shape=input_shape,
            )  # fmt: skip
            pairs = zip(members, weights or [1.0] * len(members), strict=True)
            members_add(mean=mean, chosen=[Chosen(m.model, m.local, weight) for m, weight in pairs])
    finally:
        blob_discard(blob=blob)  # unless it has a row by now
    return mean


def _bad(field: str, detail: str) -> Invalid:
    return Invalid(
        f"{field}: {detail}",
        code="BAD_MEMBERS",
        errors=[{"pointer": f"/{field}", "code": "invalid", "detail": detail}],
    )
