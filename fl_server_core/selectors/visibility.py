"""Who sees what: the whole answer, one query per model."""

import uuid
from typing import TypeVar

from django.contrib.auth.models import Group
from django.db.models import Exists, Model, OuterRef, Q, QuerySet

from fl_server_core.exceptions import NotFound
from fl_server_core.models import (
    GlobalModel,
    InferenceJob,
    LocalModel,
    Metric,
    ModelVersion,
    Notification,
    Participant,
    Round,
    Task,
    Training,
    Upload,
    User,
)

M = TypeVar("M", bound=Model)


def is_admin(user: User) -> bool:
    """Admins see everything; what they may change is Django's permissions' business."""
    return user.is_active and user.is_superuser


def _takes_part(user: User, training: str) -> Exists:
    return Exists(
        Participant.objects.filter(training=OuterRef(training), user=user, removed_at=None)
    )


def users_visible_to(user: User) -> QuerySet[User]:
    """Oneself; an actor also sees the clients, to invite them."""
    users = User.objects.order_by("username")
    if is_admin(user):
        return users
    return (
        users.filter(Q(pk=user.pk) | Q(client=True, is_active=True))
        if user.actor
        else (users.filter(pk=user.pk))
    )


def groups_visible_to(user: User) -> QuerySet[Group]:
    """The groups that one is in."""
    groups = Group.objects.order_by("id")
    return groups if is_admin(user) else groups.filter(user=user)


def trainings_visible_to(user: User) -> QuerySet[Training]:
    """What one started, and what one takes part in."""
    trainings = Training.objects.select_related("model", "actor")
    if is_admin(user):
        return trainings
    return trainings.filter(Q(actor=user) | _takes_part(user, "pk"))


def models_visible_to(user: User) -> QuerySet[GlobalModel]:
    """One's own, and those of the trainings that one sees."""
    models = GlobalModel.objects.select_related("owner", "current_version__blob")
    if is_admin(user):
        return models
    return models.filter(Q(owner=user) | Q(training__actor=user) | _takes_part(user, "training"))


def local_models_visible_to(user: User) -> QuerySet[LocalModel]:
    """One's own updates, and as an actor those that one's trainings received."""
    models = LocalModel.objects.select_related("training", "round", "owner", "blob")
    if is_admin(user):
        return models
    return models.filter(Q(owner=user) | Q(training__actor=user))


def metrics_visible_to(user: User) -> QuerySet[Metric]:
    """A participant sees his own values and the server's; the actor and the model's owner see all."""
    metrics = Metric.objects.select_related("model", "local_model", "reporter")
    if is_admin(user):
        return metrics
    return metrics.filter(
        Q(model__owner=user)
        | Q(model__training__actor=user)
        | Q(_takes_part(user, "model__training"), Q(reporter=user) | Q(reporter=None))
    )


def rounds_visible_to(user: User) -> QuerySet[Round]:
    """Those of the trainings that one sees."""
    rounds = Round.objects.select_related("training")
    if is_admin(user):
        return rounds
    return rounds.filter(Q(training__actor=user) | _takes_part(user, "training"))


def versions_visible_to(user: User) -> QuerySet[ModelVersion]:
    """Those of the models that one sees."""
    models = models_visible_to(user).values("pk").order_by()
    return ModelVersion.objects.filter(model__in=models).select_related("blob", "parent")


def tasks_visible_to(user: User) -> QuerySet[Task]:
    """One's own only: a task is between the server and one client."""
    return Task.objects.filter(user=user).select_related(
        "round__training__model__current_version__blob"
    )


def notifications_visible_to(user: User) -> QuerySet[Notification]:
    """One's own."""
    notifications = Notification.objects.select_related("training")
    return notifications if is_admin(user) else notifications.filter(receiver=user)


def inference_jobs_visible_to(user: User) -> QuerySet[InferenceJob]:
    """One's own only, admins too: inputs and answers are between the server and who asked."""
    return InferenceJob.objects.filter(user=user)


def uploads_visible_to(user: User) -> QuerySet[Upload]:
    """One's own only, admins too: nobody else goes on with them."""
    return Upload.objects.filter(owner=user)


def get_visible(rows: QuerySet[M], pk: object) -> M:
    """The row with this id, or `NotFound`: unknown, malformed and invisible look the same."""
    field = rows.model._meta.pk
    try:
        key = uuid.UUID(str(pk)) if field.get_internal_type() == "UUIDField" else int(str(pk))
        row = (
            rows.filter(pk=key).first()
            if abs(int(key)) < 2**63 or isinstance(key, uuid.UUID)
            else None
        )
    except ValueError:
        row = None
    if row is None:
        raise NotFound(f"no {rows.model._meta.verbose_name} {str(pk)[:64]!r}")
    return row
