"""Commits that do not wait for the disk, and how they become durable."""

import pytest
from django.db import connection, transaction

from fl_server_core.commits import unsynced
from fl_server_core.models import User

FULL = {"sqlite": ("PRAGMA synchronous", 2), "postgresql": ("SHOW synchronous_commit", "on")}


def durability() -> object:
    with connection.cursor() as cursor:
        cursor.execute(FULL[connection.vendor][0])
        return cursor.fetchone()[0]


@pytest.mark.django_db(transaction=True)
def test_only_the_transaction_within_does_not_wait_for_the_disk() -> None:
    if connection.vendor == "sqlite":
        connection.cursor().execute("PRAGMA synchronous=FULL")

    with unsynced():
        within = durability()
        User.objects.create_user("ada", password="x")

    assert within in {1, "off"}
    assert durability() == FULL[connection.vendor][1]
    assert User.objects.filter(username="ada").exists()


@pytest.mark.django_db(transaction=True)
def test_an_error_undoes_the_transaction_and_restores_durability() -> None:
    before = durability()

    @unsynced()
    def fail() -> None:
        User.objects.create_user("ada", password="x")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()

    assert durability() == before
    assert not User.objects.exists()


@pytest.mark.django_db(transaction=True)
def test_within_another_transaction_it_is_as_durable_as_that() -> None:
    with transaction.atomic():
        before = durability()
        with unsynced():
            within = durability()

    assert within == before
