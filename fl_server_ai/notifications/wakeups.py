"""Wakes the long-polls of this process when something has changed for a user; missing a wake-up costs a second.

Three sources: this process's own commits, Redis where there is one, and a look at the rows once a second.
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Iterable
from datetime import datetime, timedelta

import redis
from django.conf import settings
from django.db import DatabaseError, connection, transaction
from django.utils import timezone

from fl_server_core.models import Task, Training

log = logging.getLogger("fl.server")
CHANNEL = "fl:wake"
LOOK_SECONDS = 1.0
REDIS_PAUSE = 5.0
MAX_KNOWN = 10_000

gate = threading.Semaphore(8)  # how many re-read their rows at once after a wake-up
_condition = threading.Condition()
_generations: dict[str, int] = {}
_floor = 0
_clock = 0
_waker: threading.Thread | None = None
_forward: Callable[[list[str]], None] | None = None
_redis_silent_until = 0.0


def generation(user_id: str) -> int:
    """A number that changes with each wake-up. Read it before the rows, and wait with it."""
    with _condition:
        return _generations.get(user_id, _floor)


def wait(user_id: str, seen: int, seconds: float) -> None:
    """Return when the generation is no longer the one seen, or after `seconds`."""
    _start_waker()
    with _condition:
        _condition.wait_for(lambda: _generations.get(user_id, _floor) != seen, seconds)


def wake(user_ids: Iterable[str]) -> None:
    """Wake these users' long-polls in this process."""
    global _clock, _floor
    with _condition:
        _clock += 1
        for user_id in user_ids:
            _generations[user_id] = _clock
        if len(_generations) > MAX_KNOWN:  # forget everybody: one spurious wake-up each
            _generations.clear()
            _floor = _clock
        _condition.notify_all()


def set_forwarder(forward: Callable[[list[str]], None] | None) -> None:
    """Also hand wake-ups to another process: the embedded child's parent serves the polls."""
    global _forward
    _forward = forward


def publish(user_ids: Iterable[str]) -> None:
    """Wake these users' long-polls, in every process, once the transaction has committed."""
    ids = list(user_ids)
    if ids:
        transaction.on_commit(lambda: _publish(ids))


def _publish(ids: list[str]) -> None:
    global _redis_silent_until
    wake(ids)
    if _forward is not None:
        _forward(ids)
    if settings.FL_EXECUTOR != "celery" or time.monotonic() < _redis_silent_until:
        return
    try:
        _client().publish(CHANNEL, json.dumps(ids))
    except (redis.RedisError, OSError) as error:
        _redis_silent_until = time.monotonic() + REDIS_PAUSE
        log.warning("wake-up not published (%s); polls notice within a second", error)


_shared: "redis.Redis | None" = None


def _client() -> "redis.Redis":
    global _shared
    if _shared is None:
        _shared = redis.Redis.from_url(
            settings.FL_REDIS_URL, socket_timeout=1, socket_connect_timeout=1
        )
    return _shared


def _start_waker() -> None:
    global _waker
    with _condition:
        if _waker is not None and _waker.is_alive():
            return
        _waker = threading.Thread(target=_look_forever, daemon=True, name="fl-waker")
        _waker.start()
        if settings.FL_EXECUTOR == "celery":
            threading.Thread(target=_listen_forever, daemon=True, name="fl-waker-redis").start()


def _look_forever() -> None:
    since = timezone.now()
    while True:
        time.sleep(LOOK_SECONDS)
        now = timezone.now()
        try:
            wake(changed_since(since - timedelta(seconds=2)))
            since = now
        except DatabaseError as error:
            log.warning("could not look for changes: %s", error)
        finally:
            connection.close()


def changed_since(moment: datetime) -> list[str]:
    """Users who got a task since then, and those whose training ended."""
    asked = Task.objects.filter(created_at__gte=moment).values_list("user_id", flat=True)
    ended = Training.objects.filter(finished_at__gte=moment).values_list(
        "memberships__user_id", flat=True
    )
    return [str(pk) for pk in {*asked, *ended}]


def _listen_forever() -> None:
    while True:
        try:
            with redis.Redis.from_url(settings.FL_REDIS_URL, socket_connect_timeout=2) as client:
                listener = client.pubsub(ignore_subscribe_messages=True)
                listener.subscribe(CHANNEL)
                for message in listener.listen():
                    wake(json.loads(message["data"]))
        except (redis.RedisError, OSError, ValueError) as error:
            log.warning("no wake-ups from Redis (%s); polls look once a second", error)
            time.sleep(REDIS_PAUSE)
