"""Guessing at passwords is stopped, and costs the guesser nothing but his time."""

import base64
from typing import Any

import pytest
import redis
from django.core.cache import caches
from django.test import Client, RequestFactory
from rest_framework.test import APIClient

from fl_server_api import guessing
from fl_server_api.guessing import GUESSES, SECONDS, SECONDS_IN_ALL, address
from fl_server_core.models import User
from fl_server_core.services.tokens import token_issue
from fl_server_core.services.users import user_prepare, user_register

pytestmark = pytest.mark.django_db
RIGHT = "a long pass phrase"


@pytest.fixture(autouse=True)
def counting(settings) -> None:
    settings.CACHES = {"default": {"BACKEND": "django.core.cache.backends.locmem.LocMemCache"}}
    caches["default"].clear()


@pytest.fixture
def bob() -> User:
    return user_register(user_prepare(username="bob", password=RIGHT))


def ask(password: str, name: str = "bob", **headers: Any) -> Any:
    said = base64.b64encode(f"{name}:{password}".encode()).decode()
    return APIClient().get("/api/users/myself/", HTTP_AUTHORIZATION=f"Basic {said}", **headers)


def test_after_ten_wrong_passwords_nobody_is_asked_for_a_while(bob, monkeypatch) -> None:
    codes = {ask(f"guess {number}").status_code for number in range(GUESSES)}

    def hashed(*_: Any, **__: Any) -> None:
        raise AssertionError("a password was hashed")

    monkeypatch.setattr("fl_server_api.auth.authenticate", hashed)
    refused = ask(RIGHT)

    assert codes == {401}
    assert (refused.status_code, refused.json()["code"]) == (429, "THROTTLED")
    assert "wrong passwords. Expected available in " in refused.json()["detail"]
    assert SECONDS - 60 < int(refused["Retry-After"]) <= SECONDS


def test_others_and_those_elsewhere_are_still_asked(bob) -> None:
    user_register(user_prepare(username="eve", password=RIGHT))
    for _ in range(GUESSES):
        ask("guess")

    assert ask(RIGHT).status_code == 429
    assert ask(RIGHT, name="eve").status_code == 200
    assert ask(RIGHT, REMOTE_ADDR="192.0.2.7").status_code == 200


def test_the_right_password_forgets_the_wrong_ones(bob) -> None:
    for _ in range(2):
        for _ in range(GUESSES - 1):
            assert ask("guess").status_code == 401
        assert ask(RIGHT).status_code == 200


def test_names_that_nobody_has_are_counted_too() -> None:
    for _ in range(GUESSES):
        assert ask("guess", name="nobody").status_code == 401

    assert ask("guess", name="nobody").status_code == 429


def test_one_name_is_guessed_at_from_many_addresses_only_so_often(bob, monkeypatch) -> None:
    monkeypatch.setattr("fl_server_api.guessing.GUESSES_IN_ALL", 5)
    user_register(user_prepare(username="eve", password=RIGHT))
    assert ask(RIGHT, REMOTE_ADDR="192.0.2.7").status_code == 200
    codes = [ask("guess", REMOTE_ADDR=f"198.51.100.{n}").status_code for n in range(5)]

    refused = ask(RIGHT, REMOTE_ADDR="203.0.113.1")

    assert codes == [401] * 5
    assert (refused.status_code, refused.json()["code"]) == (429, "THROTTLED")
    assert SECONDS_IN_ALL - 60 < int(refused["Retry-After"]) <= SECONDS_IN_ALL
    assert ask(RIGHT, REMOTE_ADDR="192.0.2.7").status_code == 200  # where he has been before
    assert ask(RIGHT, name="eve", REMOTE_ADDR="203.0.113.1").status_code == 200


def test_wrong_passwords_from_a_known_address_use_up_nobody_elses(bob, monkeypatch) -> None:
    monkeypatch.setattr("fl_server_api.guessing.GUESSES_IN_ALL", 5)
    assert ask(RIGHT, REMOTE_ADDR="192.0.2.7").status_code == 200
    codes = [ask("guess", REMOTE_ADDR="192.0.2.7").status_code for _ in range(5)]

    elsewhere = ask(RIGHT, REMOTE_ADDR="203.0.113.1")

    assert (codes, elsewhere.status_code) == ([401] * 5, 200)


def test_a_handful_of_addresses_can_not_use_up_what_all_have() -> None:
    an_hour_from_one = GUESSES * SECONDS_IN_ALL // SECONDS

    assert 16 * an_hour_from_one < guessing.GUESSES_IN_ALL


def test_tokens_are_not_counted(bob) -> None:
    key = token_issue(user=bob)
    for _ in range(GUESSES):
        ask("guess")

    assert ask("", name=key).status_code == 200


def test_behind_a_proxy_it_is_the_address_that_the_proxy_saw(bob, settings) -> None:
    settings.SECURE_PROXY_SSL_HEADER = ("HTTP_X_FORWARDED_PROTO", "https")
    for number in range(GUESSES):  # what the guesser writes himself does not help
        ask("guess", HTTP_X_FORWARDED_FOR=f"10.0.0.{number}, 192.0.2.7")

    assert ask(RIGHT, HTTP_X_FORWARDED_FOR="192.0.2.7").status_code == 429
    assert ask(RIGHT, HTTP_X_FORWARDED_FOR="192.0.2.8").status_code == 200


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("2001:db8::1", "2001:db8::ffff:1", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("::ffff:192.0.2.7", "192.0.2.7", True),
        ("::ffff:192.0.2.7", "::ffff:192.0.2.8", False),
    ],
)
def test_of_ipv6_the_network_counts(first: str, second: str, same: bool) -> None:
    requests = [RequestFactory().get("/", REMOTE_ADDR=given) for given in (first, second)]

    found = [address(request) for request in requests]

    assert (found[0] == found[1]) == same


def test_without_the_cache_people_still_log_in(bob, monkeypatch) -> None:
    def away(*_: Any, **__: Any) -> None:
        raise redis.ConnectionError("no Redis")

    for name in ("get_many", "add", "delete"):
        monkeypatch.setattr(type(caches["default"]), name, away)

    assert ask("guess").status_code == 401
    assert ask(RIGHT).status_code == 200


def test_all_processes_share_one_count(bob, settings, redis_url) -> None:
    settings.CACHES = {
        "default": {
            "BACKEND": "django.core.cache.backends.redis.RedisCache",
            "LOCATION": redis_url,
        }
    }
    for _ in range(GUESSES):
        assert ask("guess").status_code == 401

    refused = ask(RIGHT)
    assert refused.status_code == 429
    assert SECONDS - 60 < int(refused["Retry-After"]) <= SECONDS


def log_in(client: Client, password: str) -> Any:
    return client.post("/admin/login/?next=/admin/", {"username": "bob", "password": password})


def test_the_admin_login_counts_with_the_api_and_stops_as_early(bob, client, monkeypatch) -> None:
    User.objects.filter(pk=bob.pk).update(is_staff=True)
    for number in range(GUESSES - 1):
        log_in(client, f"guess {number}")
    ask("guess")

    monkeypatch.setattr("django.contrib.auth.forms.authenticate", pytest.fail)
    refused = log_in(client, RIGHT)

    assert refused.status_code == 429
    assert SECONDS - 60 < int(refused["Retry-After"]) <= SECONDS
    assert "Too many wrong passwords" in refused.content.decode()


def test_the_admin_login_lets_in_who_knows_the_password(bob, client) -> None:
    User.objects.filter(pk=bob.pk).update(is_staff=True)
    log_in(client, "guess")

    assert log_in(client, RIGHT).status_code == 302
