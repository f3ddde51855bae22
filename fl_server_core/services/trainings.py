"""Trainings: creating and deleting them, and who is in. Whatever moves one forward is in `fl_server_ai`."""

import secrets
import uuid
from collections.abc import Sequence
from typing import Any

from django.db import transaction
from django.db.models import QuerySet
from django.utils import timezone

from fl_server_core.exceptions import Conflict, Invalid, NotPermitted
from fl_server_core.killpoints import committing
from fl_server_core.lifecycle import TERMINAL_TRAINING_STATES, TaskState, TrainingState, move
from fl_server_core.models import (
    GlobalModel,
    MeanMember,
    ModelVersion,
    Participant,
    Task,
    Training,
    User,
)
from fl_server_core.models.notifications import NotificationType
from fl_server_core.models.trainings import UncertaintyMethod
from fl_server_core.services.blobs import blobs_doom_unreferenced
from fl_server_core.services.models import model_clone
from fl_server_core.services.notifications import notifications_queue


def training_locked(training_id: uuid.UUID) -> Training:
    """The training with its row locked until the transaction ends; everything below it is then ours."""
    return (
        Training.objects.select_for_update(of=("self",))
        .select_related("model__current_version", "actor")
        .get(pk=training_id)
    )


def participants_here(training: Training) -> QuerySet[User]:
    """Who is in now, for the database to look up: there may be hundreds of them."""
    return User.objects.filter(
        memberships__training=training, memberships__removed_at=None, is_active=True
    )


def participants_active(training: Training) -> list[User]:
    """Who is in now, in the order of their ids."""
    return list(participants_here(training).order_by("pk"))


@committing("training.create")
def training_create(
    *,
    actor: User,
    model: GlobalModel,
    target_num_updates: int,
    aggregation_method: str,
    options: dict[str, Any],
    uncertainty_method: str = UncertaintyMethod.NONE,
    metric_names: Sequence[str] = (),
    clients: Sequence[uuid.UUID] = (),
) -> Training:
    """Create a training that waits for its start.

    A model that has one already, or that was trained before, is cloned: rounds count from 0.
    """
    if not (actor.actor or actor.is_superuser):
        raise NotPermitted("only an actor may create trainings; ask the admin for that role")
    model = GlobalModel.objects.select_for_update(of=("self",)).get(pk=model.pk)
    if model.owner_id != actor.pk:
        raise NotPermitted("only its owner may train a model")
    if model.round or Training.objects.filter(model=model).exists():
        model = model_clone(model=model, owner=actor)
    training = Training.objects.create(
        actor=actor,
        model=model,
        base_version=model.weights,
        target_num_updates=target_num_updates,
        aggregation_method=aggregation_method,
        uncertainty_method=uncertainty_method,
        options=options,
        metric_names=list(metric_names),
        seed=secrets.randbits(62),
    )
    training_add_clients(training=training, user=actor, clients=clients)
    return training


def state_forget(training: Training) -> None:
    """A training that begins anew: what a strategy remembers of the model's weights is dropped. Locked by the caller."""
    ModelVersion.objects.filter(pk=training.model.weights.pk).update(
        strategy="", strategy_state=None, shared=None, scalars={}
    )
    training.model.weights.refresh_from_db()


def may_steer(training: Training, user: User) -> None:
    """Raise `NotPermitted` for anybody but the actor and admins."""
    if training.actor_id != user.pk and not user.is_superuser:
        raise NotPermitted("only the actor of a training may do this")


@committing("clients.add")
def training_add_clients(*, training: Training, user: User, clients: Sequence[uuid.UUID]) -> None:
    """Let clients take part from the next round on; those who are in already stay as they are.

    Also in ERROR: a retry asks those again who had a part in the failed round and are in.
    """
    may_steer(training, user)
    training = training_locked(training.pk)
    if training.state in TERMINAL_TRAINING_STATES - {TrainingState.ERROR}:
        raise Conflict(
            f"training {training.pk} has ended", code="ILLEGAL_STATE", state=training.state
        )
    users = _clients(clients)
    for member in Participant.objects.filter(training=training, user__in=users):
        if member.removed_at is not None:
            member.removed_at = None
            member.save(update_fields=["removed_at"])
    Participant.objects.bulk_create(
        [Participant(training=training, user=client) for client in users], ignore_conflicts=True
    )


@transaction.atomic
def training_drop_clients(
    *, training: Training, user: User, clients: Sequence[uuid.UUID]
) -> list[User]:
    """Take clients out at once: their open tasks end. Returns those who were in.

    The caller then asks whether the round is complete without them.
    """
    may_steer(training, user)
    training = training_locked(training.pk)
    users = _users(clients, User.objects.all())  # also those who were deactivated meanwhile
    members = Participant.objects.filter(training=training, user__in=users, removed_at=None)
    removed = [member.user for member in members.select_related("user")]
    now = timezone.now()
    members.update(removed_at=now)
    open_tasks = Task.objects.filter(
        round__training=training, user__in=removed, state=TaskState.OPEN
    )
    for task in open_tasks:
        move(
            task, TaskState.CANCELLED, failure="REMOVED: taken out of the training", finished_at=now
        )
    notifications_queue(training=training, type=NotificationType.CLIENT_REMOVED, receivers=removed)
    return removed


def _users(ids: Sequence[uuid.UUID], among: QuerySet[User]) -> list[User]:
    """These users, or `Invalid` that names the unknown ones."""
    wanted = list(dict.fromkeys(ids))
    found = {user.pk: user for user in among.filter(pk__in=wanted)}
    unknown = [str(pk) for pk in wanted if pk not in found]
    if unknown:
        raise Invalid(
            "not all provided users were found: " + ", ".join(unknown[:10]),
            code="UNKNOWN_CLIENT",
            unknown=unknown[:100],
        )
    return [found[pk] for pk in wanted]


def _clients(ids: Sequence[uuid.UUID]) -> list[User]:
    """These users, or `Invalid` that names the unknown ones and those who are no clients."""
    users = _users(ids, User.objects.filter(is_active=True))
    others = [str(user.pk) for user in users if not user.client]
    if others:
        # By id: the names of others than clients are not for actors.
        raise Invalid(
            f"these users are not registered as clients: {', '.join(others[:10])}; an admin can give "
            "them that role",
            code="NOT_A_CLIENT",
            unknown=others[:100],
        )
    return users


@committing("training.delete")
def training_delete(*, training: Training, user: User) -> None:
    """Delete a training that isn't running, with its updates; the model and its versions stay.

    A MEAN model that has one of its updates as a member is in the way: `Conflict` (MODEL_IN_USE).
    """
    may_steer(training, user)
    training = training_locked(training.pk)
    if training.state not in TERMINAL_TRAINING_STATES | {TrainingState.INITIAL}:
        raise Conflict(
            f"training {training.pk} is {training.get_state_display()}; cancel it first",
            code="ILLEGAL_STATE",
            state=training.state,
        )
    members = MeanMember.objects.filter(local_model__training=training)
    other = members.exclude(mean=training.model_id).first()
    if other is not None:
        raise Conflict(
            f"the MEAN model {other.mean_id} has an update of this training as a member; delete that "
            "model first",
            code="MODEL_IN_USE",
        )
    blobs = [pk for pk in training.local_models.values_list("blob_id", flat=True) if pk]
    blobs += [pk for pk in members.values_list("blob_id", flat=True) if pk]
    members.delete()
    training.delete()
    blobs_doom_unreferenced(ids=blobs)
