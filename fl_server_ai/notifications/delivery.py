"""Delivers queued messages: in order for each receiver, several receivers at once, no sleeping."""

import hashlib
import hmac
import json
import logging
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from urllib.parse import urlsplit

from django.conf import settings
from django.db import connection
from django.db.models import Exists, F, OuterRef, QuerySet
from django.utils import timezone

from fl_server_ai.notifications.transports import (
    TRANSPORTS,
    Message,
    Rejected,
    Transport,
    Unreachable,
)
from fl_server_core.exceptions import IllegalMove
from fl_server_core.lifecycle import NotificationState, TaskState, move
from fl_server_core.models import Notification, Task
from fl_server_core.services.tokens import webhook_secret

log = logging.getLogger("fl.server")
THREADS = 8
IN_FLIGHT = timedelta(seconds=30)  # how long a message belongs to who is sending it
FIRST_PAUSE, LONGEST_PAUSE = 5.0, 300.0
OnGone = Callable[[Task, str, str], None]


def due() -> QuerySet[Notification]:
    """What may be sent now: queued, its time has come, and nothing earlier waits for that receiver."""
    earlier = Notification.objects.filter(
        training=OuterRef("training"),
        receiver=OuterRef("receiver"),
        id__lt=OuterRef("id"),
        state=NotificationState.QUEUED,
    )
    return Notification.objects.filter(
        ~Exists(earlier), state=NotificationState.QUEUED, next_attempt_at__lte=timezone.now()
    ).order_by("id")


def next_due() -> datetime | None:
    """When the next message wants to be sent, if there is one."""
    queued = Notification.objects.filter(state=NotificationState.QUEUED)
    return queued.order_by("next_attempt_at").values_list("next_attempt_at", flat=True).first()


def deliver_due(*, on_gone: OnGone, limit: int = 100) -> int:
    """Send what is due until nothing is; returns how many were attempted.

    Each message is claimed by one conditional UPDATE, so any number of processes may do this at once.
    `on_gone(task, code, text)` hears of tasks whose client said no or can't be reached.
    """
    attempted = 0
    while attempted < limit:
        claimed = [pk for pk in due().values_list("pk", flat=True)[:THREADS] if _claim(pk)]
        if not claimed:
            break
        attempted += len(claimed)
        if len(claimed) == 1:
            _deliver(claimed[0], on_gone)
            continue
        with ThreadPoolExecutor(THREADS, thread_name_prefix="fl-webhook") as pool:
            for result in [pool.submit(_in_thread, pk, on_gone) for pk in claimed]:
                result.result()
    return attempted


def _claim(pk: int) -> bool:
    now = timezone.now()
    return bool(
        Notification.objects.filter(
            pk=pk, state=NotificationState.QUEUED, next_attempt_at__lte=now
        ).update(attempt=F("attempt") + 1, next_attempt_at=now + IN_FLIGHT)
    )


def _in_thread(pk: int, on_gone: OnGone) -> None:
    try:
        _deliver(pk, on_gone)
    finally:
        connection.close()


def _deliver(pk: int, on_gone: OnGone) -> None:
    notification = Notification.objects.select_related("receiver", "task__round", "training").get(
        pk=pk
    )
    task = notification.task
    now = timezone.now()
    try:
        if task is not None and task.state != TaskState.OPEN:
            move(notification, NotificationState.FAILED, last_error="obsolete", finished_at=now)
            return
        try:
            url = notification.receiver.message_endpoint
            status = _transport(url).deliver(message_of(notification, url))
        except Rejected as error:
            move(
                notification,
                NotificationState.REJECTED,
                last_status=error.status,
                last_error=str(error),
                finished_at=timezone.now(),
            )
            _gone(task, "REJECTED", str(error), on_gone)
        except Unreachable as error:
            _again(notification, str(error), on_gone)
        else:
            move(
                notification,
                NotificationState.DELIVERED,
                last_status=status,
                last_error="",
                finished_at=timezone.now(),
            )
    except IllegalMove:
        log.info("notification %s was settled by somebody else", pk)


def _transport(url: str) -> Transport:
    scheme = urlsplit(url).scheme
    if scheme not in TRANSPORTS:
        raise Rejected(f"BAD_ENDPOINT: nothing delivers to {scheme!r}")
    return TRANSPORTS[scheme]()


def _again(notification: Notification, error: str, on_gone: OnGone) -> None:
    if notification.attempt >= settings.FL_WEBHOOK_ATTEMPTS:
        move(
            notification,
            NotificationState.FAILED,
            last_error=error,
            finished_at=timezone.now(),
        )
        _gone(notification.task, "UNREACHABLE", error, on_gone)
        return
    pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (notification.attempt - 1))
    pause *= random.uniform(0.8, 1.2)  # noqa: S311 - spreads retries, keeps no secret
    Notification.objects.filter(pk=notification.pk, state=NotificationState.QUEUED).update(
        next_attempt_at=timezone.now() + timedelta(seconds=pause), last_error=error[:2000]
    )


def _gone(task: Task | None, code: str, text: str, on_gone: OnGone) -> None:
    """A client that has fetched its task by polling is there, whatever its webhook says."""
    if task is None:
        return
    task.refresh_from_db()
    if task.state == TaskState.OPEN and task.fetched_at is None:
        on_gone(task, code, text)


def message_of(notification: Notification, url: str) -> Message:
    """The signed message: HMAC-SHA256 over timestamp, a dot and the body, with the receiver's secret."""
    body = {
        "notification_type": notification.type,
        "training_uuid": str(notification.training_id),
        "body": notification.body,
        "delivery_id": str(notification.delivery_id),
    }
    if notification.task is not None:
        deadline = notification.task.round.deadline
        body["task_id"] = str(notification.task_id)
        body["deadline"] = deadline.isoformat() if deadline else None
    raw = json.dumps(body).encode()
    timestamp = str(int(time.time()))
    secret = webhook_secret(user=notification.receiver).encode()
    signature = hmac.new(secret, f"{timestamp}.".encode() + raw, hashlib.sha256).hexdigest()
    return Message(
        url,
        raw,
        {
            "Content-Type": "application/json",
            "User-Agent": "fl-server",
            "X-FL-Timestamp": timestamp,
            "X-FL-Delivery": str(notification.delivery_id),
            "X-FL-Signature": f"sha256={signature}",
        },
    )
