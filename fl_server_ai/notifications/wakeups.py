"""Wakes the long-polls of this process when something has changed for a user; missing a wake-up costs a second.

Three sources: this process's own commits, Redis where there is one, and a look at the rows once a second.
The threads that listen and look run only while somebody waits.
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime, timedelta
from functools import cache
from typing import NamedTuple
from uuid import UUID

import redis
from django.conf import settings
from django.db import Error, connection, transaction
from django.db.models import Q
from django.utils import timezone
from redis.backoff import NoBackoff
from redis.retry import Retry

from fl_server_core.killpoints import around
from fl_server_core.lifecycle import TaskState
from fl_server_core.models import Participant, Task

log = logging.getLogger("fl.server")
CHANNEL = "fl:wake"
LOOK_SECONDS = 1.0
OVERLAP = timedelta(seconds=10)  # rows older than this when they are committed are missed
REDIS_PAUSE = 5.0
MAX_KNOWN = 10_000

gate = threading.Semaphore(8)  # how many re-read their rows at once after a wake-up
_condition = threading.Condition()
_generations: dict[str, int] = {}
_floor = 0
_clock = 0
_waiting = 0
_listeners: dict[str, list[Callable[[], None]]] = {}
_threads: dict[str, threading.Thread] = {}
_forward: Callable[[list[str]], None] | None = None
_redis_silent_until = 0.0
_redis_away = False
_found: frozenset["Change"] = frozenset()  # by the last look


class Change(NamedTuple):
    """One that a user is woken for: which row, and the moment that it holds."""

    user_id: UUID
    row: object
    at: datetime


def generation(user_id: str) -> int:
    """A number that changes with each wake-up. Read it before the rows, and wait with it."""
    with _condition:
        return _generations.get(user_id, _floor)


def wait(
    user_id: str,
    seen: int,
    seconds: float,
    *,
    look: bool = True,
    stop: threading.Event | None = None,
) -> None:
    """Return when the generation is no longer the one seen, or after `seconds`, or once `stopped` is told of `stop`.

    Without `look` the rows are not looked at meanwhile: for callers that do so themselves.
    """

    def over() -> bool:
        return _generations.get(user_id, _floor) != seen or (stop is not None and stop.is_set())

    with _condition, _counted(look=look):
        _condition.wait_for(over, seconds)


def stopped(stop: threading.Event) -> None:
    """Set `stop`, and end the waits that were given it."""
    with _condition:
        stop.set()
        _condition.notify_all()


@contextmanager
def listening(user_id: str, told: Callable[[], None]) -> Iterator[None]:
    """Within the block `told` is called, in any thread, with each wake-up of this user.

    It must neither block nor raise. For those who wait without a thread: compare `generation` first.
    """
    with ExitStack() as stack:
        with _condition:
            stack.enter_context(_counted(look=True))
            _listeners.setdefault(user_id, []).append(told)
        try:
            yield
        finally:
            with _condition:
                _listeners[user_id].remove(told)
                if not _listeners[user_id]:
                    del _listeners[user_id]
                stack.close()


@contextmanager
def _counted(*, look: bool) -> Iterator[None]:
    """One more who waits; the condition is held at both ends."""
    global _waiting
    _waiting += 1
    try:
        if look:
            _start("fl-waker", _look)
        if settings.FL_EXECUTOR == "celery":
            _start("fl-waker-redis", _listen)
        yield
    finally:
        _waiting -= 1
        if not _waiting:
            _condition.notify_all()  # the threads may go


def wake(user_ids: Iterable[str]) -> None:
    """Wake these users' long-polls in this process."""
    global _clock, _floor
    ids = list(user_ids)
    if not ids:
        return
    with _condition:
        _clock += 1
        for user_id in ids:
            _generations[user_id] = _clock
        told = [*ids]
        if len(_generations) > MAX_KNOWN:  # forget everybody: one spurious wake-up each
            _generations.clear()
            _floor = _clock
            told = [*_listeners]
        _condition.notify_all()
        for user_id in told:
            for tell in _listeners.get(user_id, ()):
                tell()


def set_forwarder(forward: Callable[[list[str]], None] | None) -> None:
    """Also hand wake-ups to another process: the embedded child's parent serves the polls."""
    global _forward
    _forward = forward


def publish(user_ids: Iterable[str]) -> None:
    """Wake these users' long-polls, in every process, once the transaction has committed. Never raises."""
    ids = list(user_ids)
    if ids:
        transaction.on_commit(lambda: _tell(ids), robust=True)


def _tell(ids: list[str]) -> None:
    with around("wake"):
        _publish(ids)


def _publish(ids: list[str]) -> None:
    global _redis_silent_until
    wake(ids)
    if _forward is not None:
        _forward(ids)
    if settings.FL_EXECUTOR != "celery" or time.monotonic() < _redis_silent_until:
        return
    try:
        _client(settings.FL_REDIS_URL).publish(CHANNEL, json.dumps(ids))
        _note_redis(None)
    except (redis.RedisError, OSError) as error:
        _redis_silent_until = time.monotonic() + REDIS_PAUSE
        _note_redis(error)


@cache
def _client(url: str) -> redis.Redis:
    """One for all threads. It doesn't retry: whoever publishes must not be kept waiting."""
    return redis.Redis.from_url(
        url, socket_timeout=1, socket_connect_timeout=1, retry=Retry(NoBackoff(), 0)
    )


def _note_redis(error: Exception | None) -> None:
    """One line when Redis goes away, one when it is back."""
    global _redis_away
    if error is not None and not _redis_away:
        log.warning("no wake-ups through Redis (%s); polls look once a second", error)
    elif error is None and _redis_away:
        log.info("wake-ups go through Redis again")
    _redis_away = error is not None


def _start(name: str, work: Callable[[str], None]) -> None:
    """Have this thread run; the condition is held."""
    thread = _threads.get(name)
    if thread is None or not thread.is_alive():
        _threads[name] = threading.Thread(target=work, args=(name,), daemon=True, name=name)
        _threads[name].start()


def _still_waited_for(name: str, pause: float = 0.0) -> bool:
    """After a pause: whether anybody waits. If nobody does, the thread is forgotten and has to end."""
    with _condition:
        _condition.wait_for(lambda: not _waiting, pause)
        if not _waiting:
            _threads.pop(name, None)
        return bool(_waiting)


def _look(name: str) -> None:
    since = timezone.now()
    while _still_waited_for(name, LOOK_SECONDS):
        now = timezone.now()
        try:
            wake(new_since(since - OVERLAP))
            since = now
        except Error as error:
            log.warning("could not look for changes: %s", error)
        finally:
            connection.close()


def new_since(moment: datetime) -> set[str]:
    """Users for whom something has changed since then that the last look has not found: each change wakes once.

    Looks overlap, and what is no longer in one is never in a later one: nothing older need be remembered.
    """
    global _found
    before, _found = _found, changed_since(moment)
    return {str(change.user_id) for change in _found - before}


def changed_since(moment: datetime) -> frozenset[Change]:
    """Who got a task since then, who was taken out, or whose training ended or was steered."""
    now = timezone.now()
    fresh = Q(created_at__gte=moment) | Q(not_before__gte=moment)
    asked = Task.objects.filter(fresh, state=TaskState.OPEN).order_by()
    ended = Participant.objects.filter(
        Q(removed_at__gte=moment)
        | Q(training__finished_at__gte=moment)
        | Q(training__steered_at__gte=moment)
    )
    moments: list[tuple[UUID, object, tuple[datetime | None, ...]]] = [
        (user, task, (made, due))
        for user, task, made, due in asked.values_list("user_id", "pk", "created_at", "not_before")
    ]
    moments += [
        (user, membership, (removed, finished, steered))
        for user, membership, removed, finished, steered in ended.values_list(
            "user_id", "pk", "removed_at", "training__finished_at", "training__steered_at"
        )
    ]
    return frozenset(
        Change(user, row, at)
        for user, row, ats in moments
        for at in ats
        if at is not None and moment <= at <= now  # what is to come wakes when it does
    )


def _listen(name: str) -> None:
    pause = 0.0
    while _still_waited_for(name, pause):
        try:
            _hear(name)
        except (redis.RedisError, OSError) as error:
            _note_redis(error)
            pause = REDIS_PAUSE
        else:
            return


def _hear(name: str) -> None:
    """Pass on what Redis says, until nobody waits."""
    with (
        redis.Redis.from_url(
            settings.FL_REDIS_URL, socket_connect_timeout=2, retry=Retry(NoBackoff(), 0)
        ) as client,
        client.pubsub(ignore_subscribe_messages=True) as listener,
    ):
        listener.subscribe(CHANNEL)
        _note_redis(None)
        while _still_waited_for(name):
            message = listener.get_message(timeout=LOOK_SECONDS)
            if message is not None:
                wake(_ids(message["data"]))


def _ids(data: bytes) -> list[str]:
    """What a message says; none if it isn't one of ours."""
    try:
        found = json.loads(data)
    except ValueError:
        return []
    return [str(pk) for pk in found] if isinstance(found, list) else []
