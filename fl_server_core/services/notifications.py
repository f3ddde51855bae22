"""Queueing webhook messages, in the transaction that causes them."""

import uuid
from collections.abc import Iterable, Sequence
from typing import Any

from django.db.models import Min
from django.utils import timezone

from fl_server_core.models import Notification, Task, Training, User
from fl_server_core.models.notifications import NotificationType


def notifications_queue(
    *,
    training: Training,
    type: NotificationType,
    receivers: Iterable[User],
    round: int | None = None,
    tasks: Sequence[Task] = (),
) -> None:
    """Queue one message for every receiver with an endpoint; those that exist already stay as they are.

    But who is removed again hears of it again: there each call is another message.
    """
    body: dict[str, object] = {"global_model_uuid": str(training.model_id)}
    if round is not None:
        body = {"round": round, **body}
    known: dict[uuid.UUID, int] = {}
    if type == NotificationType.CLIENT_REMOVED:
        rows = Notification.objects.filter(training=training, type=type)
        known = dict(rows.values_list("receiver").annotate(lowest=Min("step")))
    task_of = {task.user_id: task for task in tasks}
    Notification.objects.bulk_create(
        [
            Notification(
                training=training,
                receiver=user,
                task=task_of.get(user.pk),
                type=type,
                step=known.get(user.pk, 0) - 1 if round is None else round,
                body=body,
                **_attempt(task_of.get(user.pk)),
            )
            for user in receivers
            if user.message_endpoint
        ],
        ignore_conflicts=True,
    )


def _attempt(task: Task | None) -> dict[str, Any]:
    """A part that is asked for again has another message, not before its time."""
    if task is None:
        return {}
    return {"asked": task.attempt, "next_attempt_at": task.not_before or timezone.now()}
