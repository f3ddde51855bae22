"""Delivers webhook messages, and lets rounds go on without clients that can't be reached."""

from django.db import transaction
from django.db.models import Exists, OuterRef

from fl_server_ai.dispatch import dispatch_notifications
from fl_server_ai.notifications.delivery import deliver_due
from fl_server_ai.services.rounds import round_advance
from fl_server_core.killpoints import committing
from fl_server_core.lifecycle import NotificationState, RoundPhase, move
from fl_server_core.models import Notification, Round, Task
from fl_server_core.services.rounds import task_fail
from fl_server_core.services.trainings import training_locked


def notifications_deliver() -> int:
    """Send what is due; returns how many messages were attempted. Any number of processes may call it.

    It leaves those who do not answer at once behind: as soon as one of them has answered, or its time is
    over, what follows from that is asked for by a hint like that of any other message.
    """
    attempted = deliver_due(on_gone=_task_gone, on_late=dispatch_notifications)
    _end_notifying()
    return attempted


def _task_gone(task: Task, code: str, text: str) -> None:
    """End the task of a client that can't be told, and ask whether the round is complete without it."""
    with transaction.atomic():
        training = training_locked(task.round.training_id)
        fresh = Task.objects.get(pk=task.pk)
        if fresh.fetched_at is None:
            task_fail(task=fresh, code=code, text=text)
            round_advance(training_id=training.pk)


def _end_notifying() -> None:
    """Rounds whose messages are all settled are collecting."""
    waiting = Notification.objects.filter(
        task__round=OuterRef("pk"), state=NotificationState.QUEUED
    )
    told = Round.objects.filter(~Exists(waiting), phase=RoundPhase.NOTIFYING)
    for pk, training_id in told.values_list("pk", "training_id"):
        with committing("round.collect"):
            training_locked(training_id)  # an update that arrives now may make the same move
            round = Round.objects.get(pk=pk)
            if round.phase == RoundPhase.NOTIFYING:
                move(round, RoundPhase.COLLECTING)
