"""How one participant's part in a round stands: done, at work, silent, offline, rejected, late, ..."""

import re
from datetime import datetime, timedelta

from django.conf import settings
from django.db import models

from fl_server_core.lifecycle import NotificationState, TaskState
from fl_server_core.models import Task

CODE = re.compile(r"[A-Z][A-Z0-9_]{0,63}")


class Part(models.TextChoices):
    """What a participant is to a round. The first four are waited for; only `done` has answered."""

    INVITED = "invited"  # asked, and heard from or reached lately, but the task was not fetched yet
    OFFLINE = "offline"  # was not told: nothing heard from this participant lately, or unreachable
    WORKING = "working"  # has fetched the task or reported on it, and is heard from
    SILENT = (
        "silent"  # was told of the task; nothing heard lately, which may be work without reports
    )
    DONE = "done"
    LATE = "late"  # no answer by the deadline
    REJECTED = "rejected"  # the participant said no
    FAILED = "failed"  # the participant said that it failed
    REFUSED = "refused"  # sent an update that was checked and refused
    QUARANTINED = "quarantined"  # sent an update that counts only if somebody releases it
    REMOVED = "removed"  # taken out of the training
    CANCELLED = "cancelled"  # the training ended, or has enough without


WAITED_FOR = frozenset({Part.INVITED, Part.OFFLINE, Part.WORKING, Part.SILENT})
NO = frozenset({"REJECTED", "CHAINING_REFUSED"})
UPDATE_REFUSED, QUARANTINED = "UPDATE_REFUSED", "QUARANTINED"
CANCELLED = {"REMOVED": Part.REMOVED, QUARANTINED: Part.QUARANTINED}
FAILED = {"UNREACHABLE": Part.OFFLINE, UPDATE_REFUSED: Part.REFUSED}
CLOSED = {TaskState.DONE: Part.DONE, TaskState.EXPIRED: Part.LATE}


def failure_code(failure: str) -> str:
    """The code of "CODE: text"; what a site says after it is not for everybody."""
    code = failure.partition(":")[0]
    return code if CODE.fullmatch(code) else ""


def part_of(task: Task, now: datetime) -> Part:
    """Read `user` and `notifications` with the task where there are many."""
    if task.state in CLOSED:
        return CLOSED[TaskState(task.state)]
    code = failure_code(task.failure)
    if task.state == TaskState.CANCELLED:
        return CANCELLED.get(code, Part.CANCELLED)
    if task.state == TaskState.FAILED:
        return Part.REJECTED if code in NO else FAILED.get(code, Part.FAILED)
    told = told_at(task)
    heard = heard_at(task)
    quiet = heard is None or heard < now - timedelta(seconds=settings.FL_SILENT_SECONDS)
    if quiet:
        return Part.OFFLINE if told is None else Part.SILENT
    begun = task.fetched_at is not None or task.progress_at is not None
    return Part.WORKING if begun else Part.INVITED


def told_at(task: Task) -> datetime | None:
    """When the participant got the task, by asking for it or by a webhook message that arrived."""
    if task.fetched_at is not None:
        return task.fetched_at
    delivered = [
        notification.finished_at
        for notification in task.notifications.all()
        if notification.state == NotificationState.DELIVERED and notification.finished_at
    ]
    return max(delivered, default=None)


def heard_at(task: Task) -> datetime | None:
    """The last sign of life: any request, a progress report, or a message that arrived."""
    signs = (task.user.last_seen_at, task.progress_at, told_at(task))
    return max((sign for sign in signs if sign is not None), default=None)
