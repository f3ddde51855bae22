"""A process has only so many connections to PostgreSQL, and loses none of its slots."""

import gc
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.db import OperationalError, connection

from fl_server.postgres.base import DatabaseWrapper, Slots
from tests.system.servers import Postgres

pytestmark = pytest.mark.system


@pytest.fixture
def connect(
    postgres: Postgres, django_db_blocker: Any
) -> Iterator[Callable[[Slots], DatabaseWrapper]]:
    url = postgres.create(f"connections_{time.monotonic_ns()}")
    host, name = url.rpartition("@")[2].replace("%2F", "/").rsplit("/", 1)
    settings = {**connection.settings_dict, "ENGINE": "fl_server.postgres", "OPTIONS": {}}
    settings |= {"NAME": name, "HOST": host, "USER": "postgres", "PASSWORD": "", "PORT": ""}

    def make(slots: Slots) -> DatabaseWrapper:
        made = DatabaseWrapper(settings, "default")
        made.inc_thread_sharing()
        made.slots = slots
        return made

    with django_db_blocker.unblock():
        yield make


def asked(wrapper: DatabaseWrapper, query: str = "SELECT 7") -> int:
    with wrapper.cursor() as cursor:
        cursor.execute(query)
        return int(cursor.fetchone()[0])


def test_who_finds_none_free_waits_until_another_closes(
    connect: Callable[[Slots], DatabaseWrapper],
) -> None:
    slots = Slots(1)
    first, second = connect(slots), connect(slots)
    assert asked(first) == 7
    answers: list[int] = []
    waiting = threading.Thread(target=lambda: answers.append(asked(second)))

    waiting.start()
    waiting.join(0.3)
    before = list(answers)
    first.close()
    waiting.join(20)
    first.close()  # again: gives nothing back that is not there

    assert (before, answers) == ([], [7])
    third = connect(Slots(1, seconds=0.0))
    third.slots = slots
    slots._seconds = 0.0
    with pytest.raises(OperationalError, match="all 1 connections of this process"):
        asked(third)
    second.close()
    assert asked(third) == 7
    third.close()


def test_a_connection_that_was_lost_or_never_made_gives_its_slot_back(
    connect: Callable[[Slots], DatabaseWrapper],
) -> None:
    slots = Slots(1, seconds=5.0)
    unmade = connect(slots)
    unmade.settings_dict = {**unmade.settings_dict, "NAME": "no_such_database"}
    with pytest.raises(OperationalError, match="no_such_database"):
        asked(unmade)
    lost = connect(slots)
    assert asked(lost) == 7

    del lost  # as when its thread ends without closing it
    gc.collect()

    last = connect(slots)
    assert asked(last) == 7
    last.close()


def backend(wrapper: DatabaseWrapper) -> int:
    return asked(wrapper, "SELECT pg_backend_pid()")


def test_a_connection_goes_to_the_next_who_wants_one_as_if_it_were_new(
    connect: Callable[[Slots], DatabaseWrapper],
) -> None:
    slots = Slots(1, seconds=5.0)
    first, second = connect(slots), connect(slots)
    before = backend(first)
    first.set_autocommit(False)
    with first.cursor() as cursor:
        cursor.execute("CREATE TABLE left_open (id int)")

    first.close()
    after = backend(second)

    assert after == before
    with second.cursor() as cursor:
        cursor.execute("SELECT to_regclass('left_open')")
        assert cursor.fetchone()[0] is None  # rolled back
    assert second.get_autocommit()
    second.close()


def test_a_kept_connection_that_the_server_has_ended_is_made_anew(
    connect: Callable[[Slots], DatabaseWrapper],
) -> None:
    slots = Slots(2, seconds=5.0)
    first, killer = connect(slots), connect(slots)
    ended = backend(first)
    assert asked(killer) == 7
    first.close()
    with killer.cursor() as cursor:
        cursor.execute("SELECT pg_terminate_backend(%s)", [ended])
        for _ in range(100):
            cursor.execute("SELECT count(*) FROM pg_stat_activity WHERE pid = %s", [ended])
            if not cursor.fetchone()[0]:
                break
            time.sleep(0.05)

    assert backend(first) != ended

    first.close()
    killer.close()


def test_a_child_leaves_its_parents_connections_alone(
    connect: Callable[[Slots], DatabaseWrapper],
) -> None:
    slots = Slots(1, seconds=5.0)
    first = connect(slots)
    before = backend(first)
    first.close()

    slots.forked()  # as in a child

    assert backend(first) != before
    first.close()
