"""Global models: creating, copying and deleting them. Their bytes are stored before any of this."""

from collections.abc import Iterable

from django.db import transaction

from fl_server_core.exceptions import Conflict, NotPermitted
from fl_server_core.killpoints import committing
from fl_server_core.models import Blob, GlobalModel, ModelVersion, Training, User
from fl_server_core.models.weights import ModelType
from fl_server_core.services.blobs import blobs_doom_unreferenced
from fl_server_core.services.quotas import storage_claimed


@committing("model.create")
def model_create(
    *,
    owner: User,
    name: str,
    description: str,
    container: str,
    weights: Blob,
    round: int = 0,
    type: str = ModelType.GLOBAL,
    input_shape: list[int | None] | None = None,
    preprocessing: Blob | None = None,
    template: Blob | None = None,
    ties: Iterable[Iterable[str]] = (),
    awaits_weights: bool = False,
) -> GlobalModel:
    """Store a model with its uploaded weights as version `round`."""
    for blob in (weights, preprocessing, template):
        if blob is not None:
            blob.save()
    model = GlobalModel.objects.create(
        owner=owner,
        name=name,
        description=description,
        container=container,
        type=type,
        round=round,
        input_shape=input_shape,
        preprocessing=preprocessing,
        template=template,
        ties=[list(names) for names in ties],
        awaits_weights=awaits_weights,
    )
    return _first_version(model, weights)


@transaction.atomic
def model_clone(*, model: GlobalModel, owner: User) -> GlobalModel:
    """A new model with the same current weights (the same stored bytes), at round 0 and without history.

    What the strategy remembers of these weights comes along; a training says at its start whether it is wanted.
    """
    version = model.weights
    copy = GlobalModel.objects.create(
        owner=owner,
        name=model.name,
        description=model.description,
        type=model.type,
        container=model.container,
        round=0,
        input_shape=model.input_shape,
        preprocessing=model.preprocessing,
        template=model.template,
        ties=model.ties,
        statistics=model.statistics,
        awaits_weights=model.awaits_weights,
    )
    return _first_version(copy, version.blob, parent=version)


def _first_version(
    model: GlobalModel, blob: Blob, parent: ModelVersion | None = None
) -> GlobalModel:
    model.current_version = ModelVersion.objects.create(
        model=model,
        number=model.round,
        blob=blob,
        parent=parent,
        strategy=parent.strategy if parent else "",
        strategy_state=parent.strategy_state if parent else None,
        shared=parent.shared if parent else None,
        scalars=parent.scalars if parent else {},
    )
    model.save(update_fields=["current_version"])
    return model


@transaction.atomic
def model_delete(*, model: GlobalModel, user: User) -> None:
    """Delete a model that no training uses; only its owner may. Its files follow in the next sweep."""
    if model.owner_id != user.pk and not user.is_superuser:
        raise NotPermitted("only its owner may delete a model")
    training = Training.objects.filter(model=model).first()
    if training is not None:
        raise Conflict(
            f"training {training.pk} uses this model; delete the training first",
            code="MODEL_IN_USE",
            state=training.state,
        )
    ensemble = model.ensembles.exclude(mean=model).first()
    if ensemble is not None:
        raise Conflict(
            f"the MEAN model {ensemble.mean_id} has this model, or an update of it, as a member; delete "
            "that one first",
            code="MODEL_IN_USE",
        )
    blobs = [blob for blob in model.members.values_list("blob_id", flat=True) if blob]
    blobs += list(model.versions.values_list("blob_id", flat=True))
    blobs += [blob for blob in (model.preprocessing_id, model.template_id) if blob]
    GlobalModel.objects.filter(pk=model.pk).update(current_version=None)
    model.versions.all().delete()
    model.delete()
    blobs_doom_unreferenced(ids=blobs)


def preprocessing_set(*, model: GlobalModel, user: User, preprocessing: Blob) -> None:
    """Replace the preprocessing that travels with a model; only its owner may, as far as his quota goes."""
    if model.owner_id != user.pk and not user.is_superuser:
        raise NotPermitted("only its owner may change a model's preprocessing")
    former = model.preprocessing_id
    with storage_claimed(user=user, size=preprocessing.size):
        preprocessing.save()
        model.preprocessing = preprocessing
        model.save(update_fields=["preprocessing"])
        if former:
            blobs_doom_unreferenced(ids=[former])
