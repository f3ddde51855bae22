"""Wake-ups: a change between looking and waiting is never missed, whichever way the news travels."""

import json
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from typing import Any

import pytest
import redis
from django.db import transaction
from django.utils import timezone

from fl_server_ai.notifications import wakeups
from fl_server_ai.services.controls import training_pause, training_resume
from fl_server_ai.services.trainings import training_clients_remove, training_start
from fl_server_core.models import Task
from tests.scenes import scene

LONG = 60.0  # nothing here may take that long
ENOUGH = 20.0


@pytest.fixture(autouse=True)
def only_what_is_tested(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No looking at rows unless a test turns it on; every test ends with its threads ended."""
    monkeypatch.setattr(wakeups, "LOOK_SECONDS", 3_600.0)
    monkeypatch.setattr(wakeups, "_redis_silent_until", 0.0)
    monkeypatch.setattr(wakeups, "_redis_away", False)
    yield
    for thread in list(wakeups._threads.values()):
        thread.join(ENOUGH)
        assert not thread.is_alive()


def ends(work: Callable[[], object]) -> bool:
    """Whether it returns long before it would give up."""
    thread = waiting(work)
    thread.join(ENOUGH)
    return not thread.is_alive()


def waiting(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def until(true: Callable[[], bool]) -> None:
    pause = threading.Event()
    for _ in range(2_000):
        if true():
            return
        pause.wait(0.01)
    raise AssertionError("it never became true")


def somebody_waits() -> bool:
    with wakeups._condition:
        return wakeups._waiting > 0


def test_a_wake_up_between_looking_and_waiting_is_not_missed() -> None:
    seen = wakeups.generation("ada")

    wakeups.wake(["ada"])

    assert ends(lambda: wakeups.wait("ada", seen, LONG))


def test_a_waiting_poll_is_woken() -> None:
    seen = wakeups.generation("ada")
    poll = waiting(lambda: wakeups.wait("ada", seen, LONG))
    until(somebody_waits)

    wakeups.wake(["grace", "ada"])

    poll.join(ENOUGH)
    assert not poll.is_alive()


def test_somebody_elses_wake_up_wakes_nobody() -> None:
    seen = wakeups.generation("ada")

    wakeups.wake(["grace"])
    wakeups.wake([])

    assert wakeups.generation("ada") == seen


def test_without_a_wake_up_a_wait_ends_by_itself() -> None:
    assert ends(lambda: wakeups.wait("ada", wakeups.generation("ada"), 0.01))


def test_no_change_is_missed_in_a_race() -> None:
    """A poll that reads and waits, and a writer that writes and wakes: each value must be seen."""
    rows = {"value": 0}
    read = threading.Semaphore(0)

    def poll() -> None:
        for wanted in range(1, 301):
            while True:
                seen = wakeups.generation("ada")
                if rows["value"] >= wanted:
                    break
                wakeups.wait("ada", seen, LONG)
            read.release()

    thread = waiting(poll)
    for value in range(1, 301):
        rows["value"] = value
        wakeups.wake(["ada"])
        assert read.acquire(timeout=ENOUGH), f"change {value} was missed"
    thread.join(ENOUGH)

    assert not thread.is_alive()


def test_memory_is_bounded_and_forgetting_loses_no_wake_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(wakeups, "MAX_KNOWN", 10)
    seen = {name: wakeups.generation(name) for name in ("ada", "grace")}

    wakeups.wake(["ada"])
    for i in range(100):
        wakeups.wake([f"user-{i}"])

    assert len(wakeups._generations) <= 10
    assert wakeups.generation("ada") != seen["ada"]
    after = wakeups.generation("grace")
    wakeups.wake(["grace"])
    assert wakeups.generation("grace") != after


def test_threads_end_when_nobody_waits() -> None:
    poll = waiting(lambda: wakeups.wait("ada", wakeups.generation("ada"), LONG))
    until(lambda: "fl-waker" in wakeups._threads and somebody_waits())
    waker = wakeups._threads["fl-waker"]
    assert waker.is_alive()

    wakeups.wake(["ada"])
    poll.join(ENOUGH)
    waker.join(ENOUGH)

    assert not waker.is_alive()
    assert wakeups._threads == {}


@pytest.mark.django_db(transaction=True)
def test_publishing_waits_for_the_commit() -> None:
    seen = wakeups.generation("ada")

    with transaction.atomic():
        wakeups.publish(["ada"])
        assert wakeups.generation("ada") == seen

    assert wakeups.generation("ada") != seen


@pytest.mark.django_db(transaction=True)
def test_what_is_rolled_back_wakes_nobody() -> None:
    seen = wakeups.generation("ada")

    with transaction.atomic():
        wakeups.publish(["ada"])
        transaction.set_rollback(True)

    assert wakeups.generation("ada") == seen


@pytest.mark.django_db(transaction=True)
def test_a_forwarder_that_fails_never_reaches_the_caller(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(_: list[str]) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(wakeups, "_forward", broken)
    seen = wakeups.generation("ada")

    with transaction.atomic():
        wakeups.publish(["ada"])

    assert wakeups.generation("ada") != seen


@pytest.mark.django_db(transaction=True)
def test_a_commit_that_nobody_told_of_is_found_by_looking(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waited = scene("ada", started=False)
    ada = str(waited.sites["ada"].pk)
    monkeypatch.setattr(wakeups, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(wakeups, "_publish", lambda ids: None)
    seen = wakeups.generation(ada)
    poll = waiting(lambda: wakeups.wait(ada, seen, LONG))
    until(somebody_waits)

    training_start(training=waited.training, user=waited.actor)

    poll.join(ENOUGH)
    assert not poll.is_alive()


@pytest.mark.django_db(transaction=True)
def test_a_look_finds_those_who_were_asked_taken_out_or_are_done() -> None:
    found = scene("ada", "grace", "edsger", rounds=1, skip_model_tests=True)
    ids = {name: str(user.pk) for name, user in found.sites.items()}
    before = timezone.now() - timedelta(minutes=1)
    assert changed(before) == set(ids.values())

    training_clients_remove(
        training=found.training, user=found.actor, clients=[found.sites["grace"].pk]
    )
    found.send("ada", 1.0)
    assert changed(before) == {ids["grace"], ids["edsger"]}

    found.send("edsger", 1.0)
    found.work()
    assert changed(before) == set(ids.values())
    assert changed(timezone.now() + timedelta(minutes=1)) == set()


def changed(since: datetime) -> set[str]:
    return {str(change.user_id) for change in wakeups.changed_since(since)}


@pytest.mark.django_db
def test_looks_that_overlap_wake_once_for_each_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wakeups, "_found", frozenset())
    waited = scene("ada", "grace")
    everybody = {str(user.pk) for user in waited.sites.values()}
    before = timezone.now() - timedelta(minutes=1)

    def looks() -> list[set[str]]:
        return [wakeups.new_since(before) for _ in range(3)]

    asked = looks()
    training_pause(training=waited.training, user=waited.actor)
    paused = looks()
    training_resume(training=waited.training, user=waited.actor)
    resumed = looks()

    assert asked == paused == resumed == [everybody, set(), set()]


@pytest.mark.django_db
def test_a_task_that_is_due_later_wakes_when_it_is_made_and_when_it_is_due(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(wakeups, "_found", frozenset())
    waited = scene("ada")
    ada, now = {str(waited.sites["ada"].pk)}, timezone.now()
    before = now - timedelta(seconds=10)
    Task.objects.update(created_at=now, not_before=now + timedelta(seconds=5))

    made = [wakeups.new_since(before) for _ in range(2)]
    monkeypatch.setattr(timezone, "now", lambda: now + timedelta(seconds=6))
    due = [wakeups.new_since(before) for _ in range(2)]

    assert made == due == [ada, set()]


# --- Redis ------------------------------------------------------------------------------------


def subscribers(url: str) -> int:
    with redis.Redis.from_url(url) as client:
        return int(client.pubsub_numsub(wakeups.CHANNEL)[0][1])


@pytest.fixture
def through_redis(settings: Any, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    settings.FL_EXECUTOR = "celery"
    settings.FL_REDIS_URL = redis_url
    monkeypatch.setattr(wakeups, "_look", lambda name: None)
    return redis_url


def listens(url: str, monkeypatch: pytest.MonkeyPatch) -> threading.Thread:
    monkeypatch.setattr(wakeups, "LOOK_SECONDS", 0.05)
    seen = wakeups.generation("ada")
    poll = waiting(lambda: wakeups.wait("ada", seen, LONG))
    until(lambda: subscribers(url) == 1)
    return poll


def test_another_process_wakes_polls_through_redis(
    through_redis: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    poll = listens(through_redis, monkeypatch)

    with redis.Redis.from_url(through_redis) as client:
        client.publish(wakeups.CHANNEL, json.dumps(["grace", "ada"]))

    poll.join(ENOUGH)
    assert not poll.is_alive()
    until(lambda: subscribers(through_redis) == 0)


def test_a_lost_connection_is_made_again(
    through_redis: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wakeups, "REDIS_PAUSE", 0.02)
    poll = listens(through_redis, monkeypatch)

    with redis.Redis.from_url(through_redis) as client:
        client.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
        until(lambda: subscribers(through_redis) == 1)
        until(lambda: client.publish(wakeups.CHANNEL, json.dumps(["ada"])) == 1)

    poll.join(ENOUGH)
    assert not poll.is_alive()


def test_nonsense_in_the_channel_is_survived(
    through_redis: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    poll = listens(through_redis, monkeypatch)

    with redis.Redis.from_url(through_redis) as client:
        for message in ("{", "7", "null", json.dumps(["ada"])):
            assert client.publish(wakeups.CHANNEL, message) == 1

    poll.join(ENOUGH)
    assert not poll.is_alive()


@pytest.mark.django_db(transaction=True)
def test_a_commit_is_published_through_redis(through_redis: str) -> None:
    with redis.Redis.from_url(through_redis) as client, client.pubsub() as listener:
        listener.subscribe(wakeups.CHANNEL)
        listener.get_message(timeout=ENOUGH)

        wakeups.publish(["ada", "grace"])

        message = listener.get_message(timeout=ENOUGH)

    assert message is not None
    assert json.loads(message["data"]) == ["ada", "grace"]


@pytest.mark.django_db(transaction=True)
def test_without_redis_the_caller_goes_on_and_is_told_once(
    settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.FL_EXECUTOR = "celery"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        settings.FL_REDIS_URL = f"redis://127.0.0.1:{free.getsockname()[1]}/0"
    said: list[str] = []
    monkeypatch.setattr(wakeups.log, "warning", lambda text, *_: said.append(text))
    seen = wakeups.generation("ada")

    wakeups.publish(["ada"])
    wakeups.publish(["ada"])

    assert wakeups.generation("ada") != seen
    assert len(said) == 1
    assert logging.getLogger("fl.server") is wakeups.log
