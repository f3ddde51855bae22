"""Delivers queued messages: many receivers at once, no sleeping, and nobody waits for who does not answer."""

import hashlib
import hmac
import json
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from datetime import timedelta
from urllib.parse import urlsplit
from uuid import UUID

from django.conf import settings
from django.utils import timezone

from fl_server_ai.notifications.transports import (
    TRANSPORTS,
    Message,
    Rejected,
    Transport,
    Unreachable,
)
from fl_server_ai.notifications.turns import OBSOLETE, claim, turns
from fl_server_core.connections import connection_release
from fl_server_core.exceptions import IllegalMove
from fl_server_core.killpoints import around
from fl_server_core.lifecycle import NotificationState, TaskState, move
from fl_server_core.models import Notification, Task
from fl_server_core.models.notifications import NotificationType
from fl_server_core.services.tokens import webhook_secret

log = logging.getLogger("fl.server")
THREADS = 64  # receivers that are told at a time; a thread mostly waits for one of them
KEPT_FREE = 16  # threads that nobody takes of whom it isn't known that he answers
AT_A_TIME = 50
PATIENCE = 1.0  # seconds; a call does not wait for those who let it wait longer
MAX_ERROR = 2_000
LONGEST_PAUSE = 300.0  # seconds
OnGone = Callable[[Task, str, str], None]
OnLate = Callable[[], None]

_pool = ThreadPoolExecutor(THREADS, thread_name_prefix="fl-webhook")
_away: set[UUID] = set()  # receivers that this process is sending to
_starting = threading.Lock()
_desks = threading.Semaphore(4)  # so many of the threads have a connection to the database


def deliver_due(*, on_gone: OnGone, on_late: OnLate, limit: int = AT_A_TIME) -> int:
    """Send what is due until nothing is; returns how many were attempted, `limit` at most.

    Each message is claimed by one conditional UPDATE, so any number of processes may do this at once. In
    each, a receiver is sent one message at a time, whatever the number of its trainings.

    Attempts that take longer than `PATIENCE` go on after the call has returned, and other calls send the
    rest meanwhile; `on_late()` says that one of them has come to its end. A kill there is like one in the call:
    the claim expires, the attempt is counted.
    `on_gone(task, code, text)` hears of tasks whose client said no or can't be reached.
    """
    attempted = 0
    sending: set[Future[None]] = set()
    while True:
        started = _start(limit - attempted, on_gone, on_late)
        attempted += len(started)
        done, sending = wait(sending | started, PATIENCE, FIRST_COMPLETED)
        if not done:
            return attempted


def _start(most: int, on_gone: OnGone, on_late: OnLate) -> set[Future[None]]:
    started: set[Future[None]] = set()
    if most <= 0:
        return started
    with _starting:
        for pk, receiver in turns(_away.copy(), threads=THREADS, kept=KEPT_FREE, most=most):
            if claim(pk):
                _away.add(receiver)
                started.add(_pool.submit(_in_thread, pk, receiver, on_gone, on_late))
    return started


def _in_thread(pk: int, receiver: UUID, on_gone: OnGone, on_late: OnLate) -> None:
    began = time.monotonic()
    try:
        _deliver(pk, on_gone)
    except (IllegalMove, Notification.DoesNotExist):
        log.info("notification %s was settled or deleted by somebody else", pk)
    except (
        Exception
    ):  # one message must not stop the others; its claim expires, attempts are counted
        log.exception("notification %s could not be handled", pk)
    finally:
        if time.monotonic() - began > PATIENCE / 2:
            with _desk():  # until it is its turn, this thread is not free
                _away.discard(receiver)
                on_late()
        else:
            _away.discard(receiver)


@contextmanager
def _desk() -> Iterator[None]:
    """Work on rows. Who waits for a receiver, or for its turn here, has no connection."""
    with _desks:
        try:
            yield
        finally:
            connection_release()


def _deliver(pk: int, on_gone: OnGone) -> None:
    """One attempt. The task goes before the message is settled: a kill in between repeats, it loses nothing."""
    with _desk():
        notification = Notification.objects.select_related(
            "receiver", "task__round", "training"
        ).get(pk=pk)
        if _hopeless(notification, on_gone):
            return
        url = notification.receiver.message_endpoint
        message = message_of(notification, url)
    status, failure = None, None
    try:
        transport = _transport(url)
        with around("message.send"):
            status = transport.deliver(message)
    except (Rejected, Unreachable) as error:
        failure = error
    with _desk():
        if isinstance(failure, Unreachable):
            _again(notification, str(failure), on_gone)
        elif failure is not None:
            _gone(notification.task, "REJECTED", str(failure), on_gone)
            _settle(notification, NotificationState.REJECTED, str(failure), failure.status)
        else:
            _settle(notification, NotificationState.DELIVERED, "", status)


def _hopeless(notification: Notification, on_gone: OnGone) -> bool:
    """Settle what need not be sent: its task is over, or the last attempt never came to its end."""
    if notification.task is not None and notification.task.state != TaskState.OPEN:
        _settle(notification, NotificationState.FAILED, OBSOLETE)
        return True
    if notification.attempt > settings.FL_WEBHOOK_ATTEMPTS:
        _give_up(notification, notification.last_error or "no attempt came to its end", on_gone)
        return True
    return False


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
    try:
        scheme = urlsplit(url).scheme
    except ValueError as error:
        raise Rejected(f"BAD_ENDPOINT: {error}") from error
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
