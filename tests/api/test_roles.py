"""Who may do what: every role on every route with every method. A new route must be entered here."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
from django.db import transaction
from django.urls import URLPattern

from fl_server_api.urls import urlpatterns
from fl_server_core.models import ApiToken
from fl_server_core.models.inference import JobKind
from fl_server_core.services.inference import job_create
from fl_server_core.services.uploads import upload_create
from tests.scenes import Scene, person, scene

pytestmark = pytest.mark.django_db
ROLES = ("anonymous", "outsider", "participant", "actor", "admin")
METHODS = ("get", "post", "put", "patch", "delete")
OPEN, ALL = set(ROLES), set(ROLES) - {"anonymous"}
INSIDE = {"participant", "actor", "admin"}
OWNER = {"actor", "admin"}
# For each route and method that exists: who gets past authentication, visibility and permission.
# What the body then deserves (400, 409, 415) is not asked here.
ALLOWED: dict[str, dict[str, set[str]]] = {
    "": {"get": OPEN},
    "users/": {"get": ALL, "post": {"admin"}},
    "users/myself/": {"get": ALL},
    "users/myself/tokens/": {"get": ALL, "post": ALL},
    "users/myself/tokens/<str:pk>/": {"delete": {"participant"}},
    "users/myself/webhook-secret/": {"post": ALL},
    "users/groups/": {"get": ALL},
    "users/trainings/": {"get": ALL},
    "users/<str:pk>/": {"get": INSIDE},
    "groups/": {"get": ALL, "post": ALL},
    "groups/<str:pk>/": {m: {"actor", "admin"} for m in ("get", "put", "patch", "delete")},
    "models/": {"get": ALL, "post": ALL},
    "models/<str:pk>/": {"get": INSIDE, "post": {"participant"}, "delete": OWNER},
    "models/<str:pk>/metadata/": {"get": INSIDE},
    "models/<str:pk>/extras/": {"get": INSIDE},
    "models/<str:pk>/metrics/": {"get": INSIDE, "post": INSIDE},
    "models/<str:pk>/preprocessing/": {"post": INSIDE},
    "models/<str:pk>/swag/": {"get": INSIDE, "post": INSIDE},
    "trainings/": {"get": ALL, "post": ALL},
    "trainings/<str:pk>/": {"get": INSIDE, "delete": OWNER},
    "trainings/<str:pk>/clients/": {"put": INSIDE, "delete": INSIDE},
    "trainings/<str:pk>/start/": {"post": OWNER},
    **{
        f"trainings/<str:pk>/{verb}/": {"post": OWNER}
        for verb in ("pause", "resume", "cancel", "retry")
    },
    "trainings/<str:pk>/extend/": {"post": INSIDE},  # the body is read first
    "trainings/<str:pk>/models/": {"get": INSIDE},
    "trainings/<str:pk>/models/latest/": {"get": INSIDE},
    **{
        f"trainings/<str:pk>/{name}/": {"get": INSIDE}
        for name in ("rounds", "metrics", "versions", "events")
    },
    "clients/me/join/": {"post": {"outsider", "participant"}},
    "tasks/": {"get": ALL},
    "tasks/<str:pk>/progress/": {"post": {"participant"}},
    "tasks/<str:pk>/failure/": {"post": {"participant"}},
    "tasks/<str:pk>/result/": {"post": {"participant"}},
    "uploads/": {"get": ALL, "post": ALL},
    "uploads/<str:pk>/": {
        "get": {"participant"},
        "patch": {"participant"},
        "delete": {"participant"},
    },
    "updates/<str:pk>/release/": {"post": OWNER},
    "updates/<str:pk>/refuse/": {"post": OWNER},
    "models/<str:pk>/calibration/": {"post": INSIDE},
    "calibrations/<str:pk>/": {"get": {"participant"}},
    "inference/": {"post": ALL},
    "inference/<str:pk>/": {"get": {"participant"}},
    "aggregators/": {"get": ALL},
    "uncertainty-methods/": {"get": ALL},
    "schema/": {"get": OPEN},
    "schema/swagger-ui/": {"get": OPEN},
    "schema/redoc/": {"get": OPEN},
}


def routes() -> Iterator[str]:
    for entry in urlpatterns:
        assert isinstance(entry, URLPattern)
        if str(entry.pattern) != "^.*$":
            yield str(entry.pattern)


def test_the_table_names_every_route_and_no_other() -> None:
    assert set(routes()) == set(ALLOWED)


@pytest.fixture
def world(login, monkeypatch) -> dict[str, Any]:
    monkeypatch.setattr("fl_server_api.views.results.STREAM_SECONDS", 0)  # or events would go on
    running: Scene = scene()
    running.send("ada", 1.0)
    people = {
        "anonymous": None,
        "outsider": person("outsider", client=True),
        "participant": running.sites["grace"],
        "actor": running.actor,
        "admin": person("root", is_superuser=True, is_staff=True, actor=True),
    }
    clients = {role: login(user) for role, user in people.items()}
    group = clients["actor"].post("/api/groups/", {"name": "g"}).json()["id"]
    token = ApiToken.objects.get(user=people["participant"])
    question = job_create(
        user=people["participant"], model=running.model, weights=None, method="NONE",
        return_format="json", data=b"", file=None,
    )  # fmt: skip
    judged = job_create(
        user=people["participant"], model=running.model, weights=None, method="NONE",
        kind=JobKind.CALIBRATION, return_format="json", data=b"", file=None,
    )  # fmt: skip
    return {
        "clients": clients,
        "inference": question.pk,
        "calibrations": judged.pk,
        "uploads": upload_create(owner=people["participant"], length=1).pk,
        "users": people["participant"].pk,
        "users/myself/tokens": token.pk,
        "groups": group,
        "models": running.training.model_id,
        "trainings": running.training.pk,
        "tasks": running.task("grace").pk,
        "updates": running.round.local_models.get().pk,
    }


def url_of(route: str, world: dict[str, Any]) -> str:
    return (
        "/api/" + route.replace("<str:pk>", str(world[route.split("/<")[0].rstrip("/")]))
        if ("<" in route)
        else "/api/" + route
    )


@pytest.mark.parametrize("route", sorted(ALLOWED))
def test_each_role_gets_what_the_table_says(world, subtests: pytest.Subtests, route: str) -> None:
    for method, role in itertools.product(METHODS, ROLES):
        with subtests.test(method=method, role=role):
            with transaction.atomic():  # what one may change must not decide for the others
                client, url = world["clients"][role], url_of(route, world)
                response = getattr(client, method)(
                    url, {}, format="json", HTTP_TUS_RESUMABLE="1.0.0"
                )
                transaction.set_rollback(True)
            if response.streaming:
                b"".join(response.streaming_content)  # to its end, which closes the file
            status = response.status_code
            assert status < 500, response.content
            if method not in ALLOWED[route]:
                assert status in {401, 403, 404, 405}
            elif role in ALLOWED[route][method]:
                assert status not in {401, 404, 405}, response.content
            elif role == "anonymous":
                assert status in {401, 403}
                if status == 401:
                    assert response["WWW-Authenticate"]
            else:
                assert status in {403, 404}, response.content


def test_api_v1_is_the_same_thing(world, subtests: pytest.Subtests) -> None:
    for route in (r for r in sorted(ALLOWED) if "<" in r):
        with subtests.test(route):
            method = next(iter(ALLOWED[route]))
            client = world["clients"]["outsider"]
            url = url_of(route, world)

            one = getattr(client, method)(url, {}, format="json")
            two = getattr(client, method)(url.replace("/api/", "/api/v1/"), {}, format="json")

            assert one.status_code == two.status_code == 404
