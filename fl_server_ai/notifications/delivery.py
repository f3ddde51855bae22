"""Delivers queued messages: in order for each receiver, several receivers at once, no sleeping."""

import hashlib
import hmac
import json
import logging
import random
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
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
from fl_server_core.killpoints import around
from fl_server_core.lifecycle import NotificationState, TaskState, move
from fl_server_core.models import Notification, Task
from fl_server_core.models.notifications import NotificationType
from fl_server_core.services.tokens import webhook_secret

log = logging.getLogger("fl.server")
THREADS = 8
AT_A_TIME = 50
# How long a message belongs to who is sending it; longer than a transport may take.
IN_FLIGHT = timedelta(seconds=30)
LONGEST_PAUSE = 300.0  # seconds
KEPT_FREE = 2  # threads that no second attempt takes: who is there is told although many are away
LOOK_SECONDS = 1.0  # how often new messages are looked for while others are being sent
MAX_ERROR = 2_000
OnGone = Callable[[Task, str, str], None]


def first_in_line() -> QuerySet[Notification]:
    """Queued messages that have nothing earlier before them for the same receiver and training."""
    earlier = Notification.objects.filter(
        training=OuterRef("training"),
        receiver=OuterRef("receiver"),
        id__lt=OuterRef("id"),
        state=NotificationState.QUEUED,
    )
    return Notification.objects.filter(~Exists(earlier), state=NotificationState.QUEUED)


def next_due() -> datetime | None:
    """When the next message wants to be sent (it may be past), if there is one."""
    waiting = first_in_line().order_by("next_attempt_at")
    return waiting.values_list("next_attempt_at", flat=True).first()


def deliver_due(*, on_gone: OnGone, limit: int = AT_A_TIME) -> int:
    """Send what is due until nothing is; returns how many were attempted, `limit` at most.

    Each message is claimed by one conditional UPDATE, so any number of processes may do this at once.
    A receiver that doesn't answer keeps one of the threads; the others go on with what is due. What has
    failed before is not tried in all threads at a time.
    `on_gone(task, code, text)` hears of tasks whose client said no or can't be reached.
    """
    attempted = 0
    sending: set[Future[None]] = set()
    with ThreadPoolExecutor(THREADS, thread_name_prefix="fl-webhook") as pool:
        while True:
            claimed = _claim_due(min(THREADS - len(sending), limit - attempted))
            attempted += len(claimed)
            sending |= {pool.submit(_in_thread, pk, on_gone) for pk in claimed}
            if not sending:
                return attempted
            _, sending = wait(sending, LOOK_SECONDS, FIRST_COMPLETED)


def _claim_due(most: int) -> list[int]:
    if most <= 0:
        return []
    due = first_in_line().filter(next_attempt_at__lte=timezone.now()).order_by("id")
    ids = due.values_list("pk", flat=True)
    fresh = list(ids.filter(attempt=0)[:most])
    again = list(ids.filter(attempt__gt=0)[: max(0, most - len(fresh) - KEPT_FREE)])
    return [pk for pk in fresh + again if _claim(pk)]


def _claim(pk: int) -> bool:
    now = timezone.now()
    due = Notification.objects.filter(
        pk=pk, state=NotificationState.QUEUED, next_attempt_at__lte=now
    )
    with around("message.claim"):
        return bool(due.update(attempt=F("attempt") + 1, next_attempt_at=now + IN_FLIGHT))


def _in_thread(pk: int, on_gone: OnGone) -> None:
    try:
        _deliver(pk, on_gone)
    except (IllegalMove, Notification.DoesNotExist):
        log.info("notification %s was settled or deleted by somebody else", pk)
    except (
        Exception
    ):  # one message must not stop the others; its claim expires, attempts are counted
        log.exception("notification %s could not be handled", pk)
    finally:
        connection.close()


def _deliver(pk: int, on_gone: OnGone) -> None:
    """One attempt. The task goes before the message is settled: a kill in between repeats, it loses nothing."""
    notification = Notification.objects.select_related("receiver", "task__round", "training").get(
        pk=pk
    )
    task = notification.task
    if task is not None and task.state != TaskState.OPEN:
        _settle(notification, NotificationState.FAILED, "obsolete")
        return
    if notification.attempt > settings.FL_WEBHOOK_ATTEMPTS:  # the last one never came to its end
        _give_up(notification, notification.last_error or "no attempt came to its end", on_gone)
        return
    try:
        url = notification.receiver.message_endpoint
        transport, message = _transport(url), message_of(notification, url)
        with around("message.send"):
            status = transport.deliver(message)
    except Rejected as error:
        _gone(task, "REJECTED", str(error), on_gone)
        _settle(notification, NotificationState.REJECTED, str(error), error.status)
    except Unreachable as error:
        _again(notification, str(error), on_gone)
    else:
        _settle(notification, NotificationState.DELIVERED, "", status)


def _settle(
    notification: Notification, state: NotificationState, error: str, status: int | None = None
) -> None:
    with around("message.settle"):
        move(
            notification,
            state,
            last_error=error[:MAX_ERROR],
            last_status=status,
            finished_at=timezone.now(),
        )


def _transport(url: str) -> Transport:
    scheme = urlsplit(url).scheme
    if scheme not in TRANSPORTS:
        raise Rejected(f"BAD_ENDPOINT: nothing delivers to {scheme!r}")
    return TRANSPORTS[scheme]()


def _again(notification: Notification, error: str, on_gone: OnGone) -> None:
    if notification.attempt >= settings.FL_WEBHOOK_ATTEMPTS:
        _give_up(notification, error, on_gone)
        return
    Notification.objects.filter(pk=notification.pk, state=NotificationState.QUEUED).update(
        next_attempt_at=timezone.now() + pause(notification.attempt), last_error=error[:MAX_ERROR]
    )


def pause(attempt: int) -> timedelta:
    """After the first attempt FL_WEBHOOK_PAUSE, then twice as long each time up to 300 s, give or take a fifth."""
    seconds = min(LONGEST_PAUSE, settings.FL_WEBHOOK_PAUSE * 2 ** min(attempt - 1, 10))
    spread = random.uniform(0.8, 1.2)  # noqa: S311 - spreads retries, keeps no secret
    return timedelta(seconds=seconds * spread)


def _give_up(notification: Notification, error: str, on_gone: OnGone) -> None:
    _gone(notification.task, "UNREACHABLE", error, on_gone)
    _settle(notification, NotificationState.FAILED, error)


def _gone(task: Task | None, code: str, text: str, on_gone: OnGone) -> None:
    """A client that has fetched its task by polling is there, whatever its webhook says."""
    if task is None:
        return
    task.refresh_from_db(fields=["state", "fetched_at"])
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
    if notification.type == NotificationType.INITIAL_WEIGHTS:
        body["upload_url"] = f"/api/tasks/{notification.task_id}/result/"
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
