"""Who is asked together: the members of MEAN models, and of trainings with the method ENSEMBLE."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fl_server_core.exceptions import NotFound
from fl_server_core.models import GlobalModel, LocalModel, MeanMember, Training
from fl_server_core.services.blobs import blobs_doom_unreferenced
from fl_server_core.services.trainings import training_locked


@dataclass(frozen=True)
class Chosen:
    """A member to be: a global model, or an update of it."""

    model: GlobalModel
    local: LocalModel | None
    weight: float


def members_add(*, mean: GlobalModel, chosen: Sequence[Chosen]) -> None:
    """Make these the members of a new MEAN model. An update's file then stays as long as the member does."""
    locals_ = [one.local for one in chosen if one.local is not None]
    for pk in sorted({local.training_id for local in locals_}):
        training_locked(pk)  # whoever gives an update's file up holds this lock
    ids = [local.pk for local in locals_]
    files = dict(LocalModel.objects.filter(pk__in=ids).values_list("pk", "blob_id"))
    for local in locals_:
        if files.get(local.pk) is None:
            raise NotFound(f"the file of update {local.pk} was deleted", code="FILE_DELETED")
    MeanMember.objects.bulk_create(
        MeanMember(
            mean=mean, model=one.model, local_model=one.local, position=at, weight=one.weight,
            blob_id=files[one.local.pk] if one.local else None,
        )
        for at, one in enumerate(chosen)
    )  # fmt: skip


def members_replace(*, training: Training, updates: Iterable[LocalModel]) -> None:
    """Let these updates be the ensemble of a training's model, weighted by samples; it is locked.

    The former members go, and their files unless something else needs them.
    """
    former = MeanMember.objects.filter(mean=training.model_id)
    blobs = [pk for pk in former.values_list("blob_id", flat=True) if pk]
    former.delete()
    MeanMember.objects.bulk_create(
        MeanMember(
            mean_id=training.model_id, model_id=training.model_id, local_model=update,
            blob_id=update.blob_id, position=at, weight=float(update.sample_size),
        )
        for at, update in enumerate(update for update in updates if update.blob_id is not None)
    )  # fmt: skip
    blobs_doom_unreferenced(ids=blobs)
