"""Rates and quotas: who asks too often or keeps too much is told so before his body is read; others are not."""

import base64
import gzip
import io
from typing import Any

import pytest
import redis
from django.conf import settings as configured
from django.core.cache import caches
from django.db import connection
from hypothesis import HealthCheck, given
from hypothesis import settings as settings_of
from hypothesis import strategies as st
from rest_framework.test import APIClient
from safetensors.numpy import save

from fl_server_api.throttling import (
    INFERENCES,
    PASSWORDS,
    REGISTRATIONS,
    SMALL,
    TOKENS,
    UPLOADS,
)
from fl_server_api.windows import Window
from fl_server_core.models import GlobalModel, User
from fl_server_core.services.quotas import storage_used
from fl_server_core.services.users import user_prepare, user_register
from tests.scenes import person, scene, weights

pytestmark = pytest.mark.django_db
TUS = {"HTTP_TUS_RESUMABLE": "1.0.0"}
DAY = 86_400  # no test runs into the next one, or hardly ever


@pytest.fixture(autouse=True)
def counting(settings) -> None:
    settings.CACHES = {"default": {"BACKEND": "django.core.cache.backends.locmem.LocMemCache"}}
    caches["default"].clear()


def refused(answer: Any) -> bool:
    body = answer.json()
    assert (answer.status_code, body["code"]) == (429, "THROTTLED"), body
    assert 1 <= int(answer["Retry-After"]) <= DAY * 1.1 + 1
    return True


def form(**fields: Any) -> dict[str, Any]:
    data = save(weights(1.0))
    file = io.BytesIO(data)
    file.name = "weights.safetensors"
    return {"name": "m", "description": "d", "model_file": file, **fields}


ROUTES: dict[str, tuple[str, str]] = {
    "models/": ("FL_RATE_UPLOADS", "actor"),
    "models/{model}/": ("FL_RATE_UPLOADS", "ada"),
    "models/{model}/swag/": ("FL_RATE_UPLOADS", "ada"),
    "models/{model}/preprocessing/": ("FL_RATE_UPLOADS", "actor"),
    "models/{model}/metrics/": ("FL_RATE_UPLOADS", "ada"),
    "tasks/{task}/result/": ("FL_RATE_UPLOADS", "ada"),
    "uploads/": ("FL_RATE_UPLOADS", "ada"),
    "inference/": ("FL_RATE_INFERENCES", "ada"),
    "models/{model}/calibration/": ("FL_RATE_INFERENCES", "ada"),
    "users/myself/tokens/": ("FL_RATE_TOKENS", "ada"),
}


@pytest.mark.parametrize("route", ROUTES)
def test_what_is_asked_too_often_is_refused_and_nobody_else_is(login, settings, route) -> None:
    setting, name = ROUTES[route]
    setattr(settings, setting, (2, DAY))
    running = scene()
    people = {"actor": running.actor, **running.sites}
    url = "/api/" + route.format(model=running.training.model_id, task=running.task("ada").pk)
    client, other = login(people[name]), login(people["grace"])

    first = [client.post(url, {}, format="json", **TUS) for _ in range(2)]

    assert all(answer.status_code not in {429, 500} for answer in first)
    assert refused(client.post(url, {}, format="json", **TUS))
    assert other.post(url, {}, format="json", **TUS).status_code != 429
    assert client.get("/api/tasks/").status_code == 200


def test_all_routes_of_one_kind_share_one_count(login, settings) -> None:
    settings.FL_RATE_UPLOADS = (2, DAY)
    client = login(person("ada", client=True))
    client.post("/api/uploads/", HTTP_UPLOAD_LENGTH="9", **TUS)
    client.post("/api/models/", {}, format="json")

    assert refused(client.post("/api/v1/uploads/", HTTP_UPLOAD_LENGTH="9", **TUS))


def test_an_update_over_the_limit_is_refused_before_it_is_staged(
    login, settings, monkeypatch
) -> None:
    settings.FL_RATE_UPLOADS = (1, DAY)
    running = scene()
    client = login(running.sites["ada"])
    url = f"/api/models/{running.training.model_id}/"
    client.post(url, {}, format="json")

    monkeypatch.setattr("fl_server_api.uploads.StagedFile", pytest.fail)
    answer = client.post(url, form(round=0, sample_size=1), format="multipart")

    assert refused(answer)
    assert running.round.local_models.count() == 0


def test_registrations_are_counted_by_address_and_those_of_admins_are_not(login, settings) -> None:
    settings.FL_OPEN_REGISTRATION = True
    settings.FL_RATE_REGISTRATIONS = (2, DAY)

    def register(client: APIClient, name: str, **headers: Any) -> Any:
        body = {"username": name, "password": "a long pass phrase"}
        return client.post("/api/users/", body, format="json", **headers)

    nobody, admin = login(None), login(person("root", is_superuser=True))
    assert [register(nobody, n).status_code for n in ("a", "b")] == [201, 201]
    assert refused(register(nobody, "c"))
    assert register(nobody, "c", REMOTE_ADDR="192.0.2.7").status_code == 201
    assert register(admin, "d").status_code == 201
    assert not User.objects.filter(username="e").exists()


@pytest.mark.django_db(transaction=True)
def test_no_lock_is_held_while_a_password_is_hashed(settings, monkeypatch) -> None:
    settings.FL_OPEN_REGISTRATION = True
    held = []

    def hashing(user: User, password: str) -> None:
        held.append(connection.in_atomic_block)
        user.password = "!"

    monkeypatch.setattr(User, "set_password", hashing)
    body = {"username": "ada", "password": "a long pass phrase"}
    answer = APIClient().post("/api/users/", body, format="json", HTTP_IDEMPOTENCY_KEY="k")

    assert (answer.status_code, held) == (201, [False])


def test_passwords_are_counted_by_address_whatever_the_name(login, settings, monkeypatch) -> None:
    settings.FL_RATE_PASSWORDS = (2, DAY)
    user = user_register(user_prepare(username="bob", password="a long pass phrase"))
    asking = APIClient()

    def ask(said: str, **headers: Any) -> Any:
        given = base64.b64encode(said.encode()).decode()
        return asking.get("/api/users/myself/", HTTP_AUTHORIZATION=f"Basic {given}", **headers)

    ask("one:guess"), ask("two:guess")
    assert ask("bob:a long pass phrase", REMOTE_ADDR="192.0.2.7").status_code == 200
    assert login(user).get("/api/users/myself/").status_code == 200  # a token

    monkeypatch.setattr("fl_server_api.auth.authenticate", pytest.fail)
    assert refused(ask("bob:a long pass phrase"))


def test_the_admin_login_counts_with_them(client, settings) -> None:
    settings.FL_RATE_PASSWORDS = (1, DAY)
    user = user_register(user_prepare(username="bob", password="a long pass phrase"))
    User.objects.filter(pk=user.pk).update(is_staff=True)
    said = {"username": "bob", "password": "a long pass phrase"}

    assert client.post("/admin/login/?next=/admin/", said).status_code == 302
    refused = client.post("/admin/login/", said)
    assert (refused.status_code, int(refused["Retry-After"]) > 0) == (429, True)
    assert "try again in some minutes" in refused.content.decode()


def test_without_the_cache_nobody_is_stopped(login, settings, monkeypatch) -> None:
    settings.FL_RATE_TOKENS = (1, DAY)
    client = login(person("ada"))

    def away(*_: Any, **__: Any) -> None:
        raise redis.ConnectionError("no Redis")

    monkeypatch.setattr(type(caches["default"]), "add", away)

    answers = [client.post("/api/users/myself/tokens/", {}, format="json") for _ in range(3)]

    assert 429 not in {answer.status_code for answer in answers}


def test_zero_is_no_limit(login, settings) -> None:
    settings.FL_RATE_TOKENS = (0, 1)
    client = login(person("ada"))

    answers = [client.post("/api/users/myself/tokens/", {}, format="json") for _ in range(5)]

    assert 429 not in {answer.status_code for answer in answers}


def test_all_processes_share_one_count_in_redis(login, settings, redis_url) -> None:
    settings.CACHES = {
        "default": {
            "BACKEND": "django.core.cache.backends.redis.RedisCache",
            "LOCATION": redis_url,
        }
    }
    settings.FL_RATE_TOKENS = (2, DAY)
    ada, eve = login(person("ada")), login(person("eve"))
    for _ in range(2):
        ada.post("/api/users/myself/tokens/", {}, format="json")

    assert refused(ada.post("/api/users/myself/tokens/", {}, format="json"))
    assert eve.post("/api/users/myself/tokens/", {}, format="json").status_code != 429


def test_in_redis_a_request_is_remembered_until_its_tenth_is_a_second_ago(
    settings, redis_url
) -> None:
    settings.CACHES = {
        "default": {
            "BACKEND": "django.core.cache.backends.redis.RedisCache",
            "LOCATION": redis_url,
        }
    }

    assert Window("one", 1, 1).take() == 0.0

    with redis.Redis.from_url(redis_url) as client:
        (key,) = client.keys("*one:*")
        assert client.pttl(key) > 1_100


# --- any period, not the clock's ---------------------------------------------------------------


class Clock:
    """What the windows take for the time."""

    def __init__(self, now: float) -> None:
        self.now = now

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    made = Clock(1_000_000.0)
    monkeypatch.setattr("fl_server_api.windows.time", made)
    return made


@given(
    gaps=st.lists(st.floats(0, 40, allow_nan=False), max_size=60),
    most=st.integers(1, 6),
    seconds=st.sampled_from([1, 10, 60]),
)
@settings_of(
    max_examples=60, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
def test_no_more_than_the_rate_pass_in_any_period_and_retry_after_is_kept(
    clock: Clock, gaps: list[float], most: int, seconds: int
) -> None:
    caches["default"].clear()
    window, passed = Window("one", most, seconds), []

    for gap in gaps:
        clock.now += gap * seconds / 60
        wait = window.take()
        if not wait:
            passed.append(clock.now)
            continue
        assert 0 < wait <= seconds * 1.1 + 1e-6
        clock.now += wait + 1e-6
        assert not window.take(), "there was to be room"
        passed.append(clock.now)

    for first, last in zip(passed, passed[most:], strict=False):
        assert last - first >= seconds


def test_the_end_of_a_minute_is_no_way_to_twice_the_rate(login, settings, clock: Clock) -> None:
    settings.FL_RATE_TOKENS = (3, 60)
    client = login(person("ada"))
    clock.now = 60 * 20_000 - 0.5

    def ask() -> Any:
        return client.post("/api/users/myself/tokens/", {}, format="json")

    before = [ask().status_code for _ in range(3)]
    clock.now += 1
    after = ask()

    assert before == [201] * 3
    assert refused(after)
    clock.now += int(after["Retry-After"]) - 1.5
    assert refused(ask())
    clock.now += 1.5
    assert [ask().status_code for _ in range(3)] == [201] * 3  # what was refused did not count


def test_small_pieces_are_counted_and_a_large_file_over_a_bad_line_is_not_stopped(
    login, settings
) -> None:
    settings.FL_RATE_PIECES = (2, DAY)
    client = login(person("ada", client=True))
    size = SMALL * 4
    url = client.post("/api/uploads/", HTTP_UPLOAD_LENGTH=str(size + 9), **TUS)["Location"]

    def piece(offset: int, data: bytes) -> Any:
        return client.generic(
            "PATCH", url, data, "application/offset+octet-stream", HTTP_UPLOAD_OFFSET=str(offset), **TUS
        )  # fmt: skip

    large = [piece(offset, bytes(SMALL)).status_code for offset in range(0, size, SMALL)]
    small = [piece(size + offset, b"x").status_code for offset in range(2)]

    assert large == [204] * 4
    assert small == [204] * 2
    assert refused(piece(size + 2, b"x"))
    assert client.head(url, **TUS)["Upload-Offset"] == str(size + 2)


def test_a_gigabyte_in_small_pieces_over_a_slow_line_stays_below_the_rate() -> None:
    """Two megabits a second, cut into 16 KiB: sixteen pieces a second, less than a sixth of what is allowed."""
    most, seconds = configured.FL_RATE_PIECES

    assert most / seconds > 2e6 / 8 / 2**14 * 6


def test_an_honest_site_is_far_from_every_limit() -> None:
    """Ten trainings with a round each second, every request sent five times."""
    busy = 10 * 5
    for rate in (UPLOADS, INFERENCES):
        most, seconds = getattr(configured, rate.setting)
        assert most / seconds >= busy
    for rate in (PASSWORDS, REGISTRATIONS, TOKENS):
        assert getattr(configured, rate.setting)[0] >= 500


# --- quota ------------------------------------------------------------------------------------


def test_a_model_that_is_too_much_is_refused_before_it_is_read(
    login, settings, monkeypatch
) -> None:
    settings.FL_USER_BYTES = 100
    client = login(person("actor", actor=True))

    monkeypatch.setattr("fl_server_api.uploads.StagedFile", pytest.fail)
    answer = client.post("/api/models/", form(), format="multipart")

    assert (answer.status_code, answer.json()["code"]) == (409, "STORAGE_QUOTA")
    assert answer.json()["quota"] == 100
    assert answer.json()["used"] == 0


def test_a_packed_body_counts_as_what_it_holds(login, settings) -> None:
    settings.FL_USER_BYTES = 5_000
    client = login(person("actor", actor=True))
    zeros = save({"w": weights(0.0)["layer.weight"].repeat(4_000, axis=0)})
    body = (
        b"--b\r\nContent-Disposition: form-data; name=\"name\"\r\n\r\nm\r\n"
        b"--b\r\nContent-Disposition: form-data; name=\"description\"\r\n\r\nd\r\n"
        b"--b\r\nContent-Disposition: form-data; name=\"model_file\"; filename=\"f\"\r\n\r\n"
        + zeros + b"\r\n--b--\r\n"
    )  # fmt: skip

    answer = client.generic(
        "POST", "/api/models/", gzip.compress(body), "multipart/form-data; boundary=b",
        HTTP_CONTENT_ENCODING="gzip",
    )  # fmt: skip

    assert (answer.status_code, answer.json()["code"]) == (409, "STORAGE_QUOTA")
    assert not GlobalModel.objects.exists()


def test_uploads_on_their_way_and_models_count_and_deleting_makes_room(login, settings) -> None:
    user = person("actor", actor=True)
    client = login(user)
    made = client.post("/api/models/", form(), format="multipart").json()["model_id"]
    stored = storage_used(user)
    settings.FL_USER_BYTES = stored + 50

    def announce(length: int) -> Any:
        return client.post("/api/uploads/", HTTP_UPLOAD_LENGTH=str(length), **TUS)

    assert stored == GlobalModel.objects.get(pk=made).weights.blob.size
    assert announce(50).status_code == 201
    assert announce(1).json()["code"] == "STORAGE_QUOTA"
    client.delete(f"/api/models/{made}/")
    assert announce(1).status_code == 201


def test_a_user_may_have_a_quota_of_his_own_and_one_does_not_count_for_others(
    login, settings
) -> None:
    settings.FL_USER_BYTES = 10
    rich = person("rich", client=True, storage_bytes=1_000)
    free = person("free", client=True, storage_bytes=0)
    poor = person("poor", client=True)

    def announce(user: User) -> int:
        client = login(user)
        return client.post("/api/uploads/", HTTP_UPLOAD_LENGTH="500", **TUS).status_code

    assert [announce(user) for user in (rich, free, poor)] == [201, 201, 409]


def test_what_somebody_reports_on_his_own_models_counts(login, settings) -> None:
    actor = person("actor", actor=True)
    client = login(actor)
    model = client.post("/api/models/", form(), format="multipart").json()["model_id"]
    url, kept = f"/api/models/{model}/metrics/", storage_used(actor)
    settings.FL_USER_BYTES = kept + 2_000
    text = {"metric_names": ["a", "b"], "metric_values": ["1.0", "x" * 500]}

    first = client.post(url, text)
    second = client.post(url, {**text, "metric_names": ["c", "d"]})

    assert (first.status_code, second.status_code) == (201, 409)
    assert second.json()["code"] == "STORAGE_QUOTA"
    assert storage_used(actor) == kept + 2 * 512 + 500


def test_an_owner_at_his_quota_answers_the_test_that_he_is_asked_for(login, settings) -> None:
    running = scene(rounds=3)
    ada = running.sites["ada"]
    GlobalModel.objects.filter(pk=running.training.model_id).update(owner=ada)
    for site in running.sites:
        running.send(site, 1.0)
    running.work()
    kept = storage_used(ada)
    settings.FL_USER_BYTES = 1
    body = {"metric_names": ["acc"], "metric_values": ["0.5"], "round": 1}

    answer = login(ada).post(f"/api/models/{running.training.model_id}/metrics/", body)

    assert (answer.status_code, running.task("ada", "evaluate").state) == (201, "done")
    assert storage_used(ada) == kept
    running.report("grace", {"acc": 0.5})
    running.work()
    again = login(ada).post(f"/api/models/{running.training.model_id}/metrics/", body)
    assert again.status_code == 201


def test_a_lost_answer_to_an_owners_metrics_is_given_again_at_his_quota(login, settings) -> None:
    actor = person("actor", actor=True)
    client = login(actor)
    model = client.post("/api/models/", form(), format="multipart").json()["model_id"]
    url, body = f"/api/models/{model}/metrics/", {"metric_names": ["a"], "metric_values": ["1.0"]}
    assert client.post(url, body).status_code == 201
    GlobalModel.objects.filter(pk=model).update(round=1)
    settings.FL_USER_BYTES = 1

    again = client.post(url, {**body, "round": 0})

    assert again.status_code == 201
    assert client.post(url, body).json()["code"] == "STORAGE_QUOTA"


def test_what_aggregations_and_updates_add_does_not_count() -> None:
    running = scene(rounds=1)
    before = storage_used(running.actor)
    for site in running.sites:
        running.send(site, 1.0)
    running.work()

    assert storage_used(running.actor) == before
    assert storage_used(running.sites["ada"]) == 0


def test_the_same_request_again_is_answered_over_the_quota_too(login, settings) -> None:
    client = login(person("actor", actor=True))
    first = client.post("/api/models/", form(), format="multipart", HTTP_IDEMPOTENCY_KEY="k" * 8)
    settings.FL_USER_BYTES = 1

    again = client.post("/api/models/", form(), format="multipart", HTTP_IDEMPOTENCY_KEY="k" * 8)

    assert (again.status_code, again.json()) == (201, first.json())
