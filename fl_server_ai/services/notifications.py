"""Delivers webhook messages, and lets rounds go on without clients that can't be reached."""

from django.db import transaction

from fl_server_ai.notifications.delivery import deliver_due
from fl_server_ai.services.rounds import round_advance
from fl_server_core.exceptions import IllegalMove
from fl_server_core.lifecycle import NotificationState, RoundPhase, move
from fl_server_core.models import Notification, Round, Task
from fl_server_core.services.rounds import task_fail
from fl_server_core.services.trainings import training_locked


def notifications_deliver() -> int:
    """Send what is due; returns how many messages were attempted. Any number of processes may call it."""
    attempted = deliver_due(on_gone=_task_gone)
    if attempted:
        _end_notifying()
    return attempted


def _task_gone(task: Task, code: str, text: str) -> None:
    with transaction.atomic():
        training_locked(task.round.training_id)
        fresh = Task.objects.get(pk=task.pk)
        task_fail(task=fresh, code=code, text=text)
        round_advance(training_id=task.round.training_id)


def _end_notifying() -> None:
    """Rounds whose messages are all settled are collecting."""
    waiting = Notification.objects.filter(state=NotificationState.QUEUED, task__isnull=False)
    for round in Round.objects.filter(phase=RoundPhase.NOTIFYING).exclude(
        pk__in=waiting.values("task__round_id")
    ):
        try:
            move(round, RoundPhase.COLLECTING)
        except IllegalMove:
            continue
