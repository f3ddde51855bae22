"""Trainings, users, lists and idempotency over HTTP."""

import hashlib
import json
from itertools import permutations
from typing import Any

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext

from fl_server_ai.services.models import model_upload
from fl_server_core.models import ApiToken, IdempotencyKey, Training, User
from fl_server_core.services.tokens import BadToken, token_user
from tests.scenes import Scene, person, scene, staged

pytestmark = pytest.mark.django_db
REGISTRATION = {"username": "ada", "password": "a long pass phrase"}


def body(running: Scene, **fields: Any) -> dict[str, Any]:
    return {
        "model_id": str(running.training.model_id),
        "target_num_updates": 2,
        "metric_names": [],
        "aggregation_method": "FedAvg",
        **fields,
    }


def test_a_training_is_created_started_and_seen(login) -> None:
    running = scene(started=False)
    client = login(running.actor)
    clients = [str(user.pk) for user in running.sites.values()]

    created = client.post("/api/trainings/", body(running, clients=clients * 2))
    training = created.json()["training_id"]
    started = client.post(f"/api/trainings/{training}/start/")
    again = client.post(f"/api/trainings/{training}/start/")
    found = client.get(f"/api/trainings/{training}/").json()

    assert (created.status_code, started.status_code) == (201, 202)
    assert (again.status_code, again.json()["state"]) == (409, "O")
    assert (found["state"], found["round"]) == ("O", 0)
    assert (found["local_models_arrived"], found["local_models_expected"]) == (0, 2)
    assert sorted(found["participants"]) == sorted(clients)
    assert found["model"] != str(running.training.model_id)  # that one was in use: it was cloned
    assert created.json()["model_id"] == found["model"]


@pytest.mark.parametrize(
    ("fields", "status", "code"),
    [
        ({"aggregation_method": "FedDC"}, 400, "BAD_OPTION"),
        ({"aggregation_method": "nonsense"}, 400, "UNKNOWN_STRATEGY"),
        (
            {"uncertainty_method": "ENSEMBLE", "options": {"uncertainty": {"N": 0}}},
            400,
            "BAD_OPTION",
        ),
        ({"uncertainty_method": "nonsense"}, 400, "INVALID"),
        ({"options": {"daisy_chain_period": -2}}, 400, "BAD_OPTION"),
        ({"options": {"unknown": 2}}, 400, "BAD_OPTION"),
        ({"options": {"round_deadline": 1e300}}, 400, "BAD_OPTION"),
        ({"options": {"round_deadline": 31_536_001}}, 400, "BAD_OPTION"),
        ({"options": {"min_updates": 100_001}}, 400, "BAD_OPTION"),
        ({"options": {"skip_model_tests": 1}}, 400, "BAD_OPTION"),
        ({"options": []}, 400, "INVALID"),
        ({"target_num_updates": 0}, 400, "INVALID"),
        ({"model_id": "x"}, 400, "INVALID"),
        ({"model_id": "00000000-0000-0000-0000-000000000000"}, 404, "NOT_FOUND"),
        ({"clients": ["00000000-0000-0000-0000-000000000000"]}, 400, "UNKNOWN_CLIENT"),
    ],
    ids=str,
)
def test_what_would_not_be_done_as_asked_is_refused(login, fields, status: int, code: str) -> None:
    running = scene(started=False)

    response = login(running.actor).post("/api/trainings/", body(running, **fields))

    assert (response.status_code, response.json()["code"]) == (status, code)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"uncertainty_method": "MCDROPOUT"}, "NONE, ENSEMBLE, MC_DROPOUT, SWAG"),
        ({"options": {"sampling": "fixed"}}, "the sampling fixed needs clients_per_round"),
        ({"options": {"clients_per_round": 2}}, "means nothing with the sampling all"),
    ],
    ids=str,
)
def test_a_refusal_says_what_would_be_right(login, fields, said: str) -> None:
    running = scene(started=False)

    response = login(running.actor).post("/api/trainings/", body(running, **fields))

    assert response.status_code == 400
    assert said in response.json()["detail"]
    assert Training.objects.count() == 1


def test_a_bad_option_is_pointed_at(login) -> None:
    running = scene(started=False)

    response = login(running.actor).post(
        "/api/trainings/",
        body(running, aggregation_method="FedProx", options={"mu": -1, "tpyo": 1}),
    )

    pointers = {error["pointer"] for error in response.json()["errors"]}
    assert pointers == {"/options/mu", "/options/tpyo"}


def test_an_unknown_option_is_told_all_that_there_are_and_the_nearest(login) -> None:
    running = scene(started=False)

    response = login(running.actor).post(
        "/api/trainings/",
        body(running, aggregation_method="FedProx", options={"minimum_updates": 2}),
    )

    detail = response.json()["detail"]
    assert (response.status_code, response.json()["code"]) == (400, "BAD_OPTION")
    assert (
        "/options/minimum_updates: unknown option minimum_updates; did you mean min_updates?"
        in detail
    )
    assert all(name in detail for name in ("mu", "round_deadline", "client_config", "uncertainty"))


def test_a_model_that_could_not_be_aggregated_is_refused_before_anybody_trains(login) -> None:
    running = scene(started=False)
    header = b'{"phase":{"dtype":"C64","shape":[2],"data_offsets":[0,16]}}'
    data = len(header).to_bytes(8, "little") + header + bytes(16)
    model = model_upload(
        owner=running.actor, name="wave", description="", model_file=staged(data), sha256=None
    )

    response = login(running.actor).post("/api/trainings/", body(running, model_id=str(model.pk)))

    assert (response.status_code, response.json()["code"]) == (422, "DTYPE_NOT_AGGREGATED")
    assert response.json()["tensor"] == "phase"


@pytest.mark.parametrize(
    ("path", "typo", "meant"),
    [
        ("trainings/", "option", "options"),
        ("trainings/", "Uncertainty_Method", "uncertainty_method"),
        ("trainings/", "client", "clients"),
        ("users/", "mesage_endpoint", "message_endpoint"),
        ("models/", "input_shapes", "input_shape"),
    ],
)
def test_a_mistyped_field_is_refused_with_the_one_that_was_meant(
    login, settings, path: str, typo: str, meant: str
) -> None:
    settings.FL_OPEN_REGISTRATION = True
    running = scene(started=False)
    fields = {"trainings/": body(running), "users/": REGISTRATION, "models/": {"name": "net"}}

    response = login(running.actor).post(f"/api/{path}", {**fields[path], typo: {"a": 1}})

    assert (response.status_code, response.json()["code"]) == (400, "UNKNOWN_FIELD")
    assert f"did you mean {meant}?" in response.json()["detail"]
    assert response.json()["errors"][0]["pointer"] == f"/{typo}"


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("message_endpoint", "site.example.org", "https://site.example.org/hook"),
        ("message_endpoint", "http://[x", "https://site.example.org/hook"),
        ("username", "Jane Doe", "letters, digits"),
    ],
)
def test_what_is_wrong_with_an_account_is_said_in_words(
    login, settings, field: str, value: str, said: str
) -> None:
    settings.FL_OPEN_REGISTRATION = True

    response = login(None).post("/api/users/", {**REGISTRATION, field: value})

    assert response.status_code == 400
    assert said in response.json()["detail"]
    assert [error["pointer"] for error in response.json()["errors"]] == [f"/{field}"]


def test_other_unknown_fields_are_ignored_as_they_always_were(login, settings) -> None:
    settings.FL_OPEN_REGISTRATION = True
    running = scene(started=False)
    more = {"csrfmiddlewaretoken": "x", "comment": "hello", "model_file": "", "optionally": 1}

    user = login(None).post(
        "/api/users/", {**REGISTRATION, "username": "joan", "password2": "x", "comment": "hi"}
    )
    training = login(running.actor).post("/api/trainings/", body(running, options={}, **more))

    assert (user.status_code, training.status_code) == (201, 201)


def test_a_missing_field_is_pointed_at(login) -> None:
    response = login(person("actor", actor=True)).post("/api/trainings/", {})

    pointers = {error["pointer"] for error in response.json()["errors"]}
    assert pointers == {
        "/model_id", "/target_num_updates", "/metric_names", "/aggregation_method",
    }  # fmt: skip


def test_clients_come_and_go(login) -> None:
    running = scene(started=False)
    client = login(running.actor)
    joan = person("joan", client=True)
    url = f"/api/trainings/{running.training.pk}/clients/"

    added = client.put(url, {"clients": [str(joan.pk)]})
    removed = client.delete(url, {"clients": [str(joan.pk)]})
    participant = login(running.sites["ada"]).put(url, {"clients": [str(joan.pk)]})

    assert (added.status_code, removed.status_code) == (202, 200)
    assert participant.status_code == 403


def test_an_account_without_the_role_of_a_client_is_told_apart_from_an_unknown_one(login) -> None:
    running = scene(started=False)
    client, joan = login(running.actor), person("joan")
    url = f"/api/trainings/{running.training.pk}/clients/"

    without_role = client.put(url, {"clients": [str(joan.pk)]})
    unknown = client.put(url, {"clients": ["00000000-0000-0000-0000-000000000000"]})

    assert (without_role.status_code, without_role.json()["code"]) == (400, "NOT_A_CLIENT")
    assert str(joan.pk) in without_role.json()["detail"]
    assert "joan" not in without_role.json()["detail"]
    assert (unknown.status_code, unknown.json()["code"]) == (400, "UNKNOWN_CLIENT")


def test_who_was_deactivated_can_still_be_taken_out(login) -> None:
    running = scene()
    User.objects.filter(username="ada").update(is_active=False, client=False)

    removed = login(running.actor).delete(
        f"/api/trainings/{running.training.pk}/clients/",
        {"clients": [str(running.sites["ada"].pk)]},
    )

    assert removed.status_code == 200
    assert running.task("ada").state == "cancelled"


def test_rounds_say_what_became_of_everybody(login) -> None:
    running = scene()
    running.send("ada", 1.0)

    rounds = login(running.actor).get(f"/api/trainings/{running.training.pk}/rounds/").json()

    states = {part["user"]: part["state"] for part in rounds[0]["participation"]}
    assert states == {
        str(running.sites["ada"].pk): "done", str(running.sites["grace"].pk): "open",
    }  # fmt: skip


def test_what_a_site_says_about_its_work_is_not_for_other_sites(login) -> None:
    running = scene("ada", "grace")
    ada, task = login(running.sites["ada"]), running.task("ada")
    ada.post(f"/api/tasks/{task.pk}/progress/", {"step": 1, "metrics": {"loss": 0.123}})
    ada.post(
        f"/api/tasks/{task.pk}/failure/",
        {"code": "TRAIN_EXCEPTION", "text": "boom", "log_tail": "/data/Jane_Doe.dcm is missing"},
    )
    url = f"/api/trainings/{running.training.pk}/rounds/"
    admin = person("root", is_superuser=True)

    for viewer in (running.sites["ada"], running.actor, admin):
        assert "Jane_Doe" in str(login(viewer).get(url).json())
    rounds = login(running.sites["grace"]).get(url).json()
    [part] = [part for part in rounds[0]["participation"] if part["user"] == str(task.user_id)]

    assert (part["state"], part["failure"], part["progress"]) == ("failed", "TRAIN_EXCEPTION", None)


def test_a_round_with_fewer_updates_than_asked_for_says_whose_are_missing_and_why(login) -> None:
    running = scene("ada", "grace", "joan", skip_model_tests=True)
    url = f"/api/trainings/{running.training.pk}/"
    running.send("ada", 1.0)
    login(running.sites["grace"]).post(
        f"/api/tasks/{running.task('grace').pk}/failure/",
        {"code": "TRAIN_EXCEPTION", "text": "Jane Doe"},
    )
    before = login(running.actor).get(url).json()["gaps"]
    login(running.actor).delete(url + "clients/", {"clients": [str(running.sites["joan"].pk)]})
    running.work()

    [gap] = login(running.actor).get(url).json()["gaps"]
    [seen_by_ada] = login(running.sites["ada"]).get(url).json()["gaps"]
    first, _ = login(running.actor).get(url + "rounds/").json()

    grace, joan = (str(running.sites[name].pk) for name in ("grace", "joan"))
    assert before == []  # joan could still have sent hers
    assert (gap["round"], gap["received"], gap["asked"]) == (0, 1, 3)
    assert (first["received"], first["asked"]) == (1, 3)
    assert gap["text"] in {
        f"round 0: 1 of 3 sites ({', '.join(who)})"
        for who in permutations(["grace failed: TRAIN_EXCEPTION", "joan cancelled: REMOVED"])
    }
    assert {m["user"]: m["code"] for m in gap["missing"]} == {
        grace: "TRAIN_EXCEPTION", joan: "REMOVED",
    }  # fmt: skip
    assert [m["name"] for m in seen_by_ada["missing"]] == ["", ""]
    assert "grace" not in seen_by_ada["text"]


def test_a_training_in_which_everybody_answers_has_no_gaps(login) -> None:
    running = scene(skip_model_tests=True)
    for _ in range(2):
        running.send("ada", 1.0)
        running.send("grace", 2.0)
        running.work()

    found = login(running.actor).get(f"/api/trainings/{running.training.pk}/").json()

    assert (found["state"], found["gaps"]) == ("C", [])


def test_a_failure_whose_code_is_a_sentence_is_hidden_whole(login) -> None:
    running = scene("ada", "grace")
    url = f"/api/trainings/{running.training.pk}/rounds/"

    login(running.sites["ada"]).post(
        f"/api/tasks/{running.task('ada').pk}/failure/", {"code": "Jane Doe is missing"}
    )

    assert "Jane" not in str(login(running.sites["grace"]).get(url).json())


def test_a_running_training_is_not_deleted_and_its_model_neither(login) -> None:
    running = scene()
    client = login(running.actor)

    training = client.delete(f"/api/trainings/{running.training.pk}/")
    model = client.delete(f"/api/models/{running.training.model_id}/")

    assert (training.status_code, training.json()["state"]) == (409, "O")
    assert (model.status_code, model.json()["code"]) == (409, "MODEL_IN_USE")


def test_lists_are_arrays_and_pages_on_request(login) -> None:
    running = scene(started=False)
    client = login(running.actor)
    for _ in range(4):
        client.post("/api/trainings/", body(running))

    plain = client.get("/api/trainings/").json()
    page = client.get("/api/trainings/?page_size=2&ordering=created_at").json()
    waiting = client.get("/api/trainings/?state=I&ordering=-created_at").json()

    assert len(plain) == 5
    assert (page["count"], len(page["results"]), page["previous"]) == (5, 2, None)
    assert page["next"]
    assert [t["created_at"] for t in waiting] == sorted(
        (t["created_at"] for t in waiting), reverse=True
    )
    assert client.get("/api/trainings/?state=C").json() == []
    assert client.get("/api/trainings/?model=x").json() == []
    assert client.get("/api/trainings/?ordering=password").status_code == 400
    assert client.get("/api/trainings/?page=99").status_code == 404


@pytest.mark.parametrize("asked", ["page_size=many", "page_size=0", "ordering=", "ordering=colour"])
def test_a_page_size_or_an_ordering_that_is_none_is_refused(login, asked: str) -> None:
    running = scene(started=False)

    answer = login(running.actor).get(f"/api/trainings/?{asked}")

    assert answer.status_code == 400
    assert asked.split("=")[0] in answer.json()["detail"]


@pytest.mark.parametrize("path", ["trainings/", "users/trainings/", "models/", "users/"])
def test_a_list_of_many_costs_as_many_queries_as_one_of_few(login, path: str) -> None:
    running = scene(started=False)
    client = login(running.actor)
    client.get(f"/api/{path}")

    def count() -> int:
        with CaptureQueriesContext(
            connection,
        ) as queries:
            assert client.get(f"/api/{path}").status_code == 200
        return len(queries)

    few = count()
    for number in range(12):
        person(f"c{number}", client=True)
        client.post("/api/trainings/", body(running, clients=[str(running.sites["ada"].pk)]))

    assert count() == few


def test_the_same_idempotency_key_creates_once(login) -> None:
    running = scene(started=False)
    client = login(running.actor)
    one, other = body(running), body(running, target_num_updates=3)

    first = client.post("/api/trainings/", one, HTTP_IDEMPOTENCY_KEY="k")
    again = client.post("/api/v1/trainings/", one, HTTP_IDEMPOTENCY_KEY="k")
    mismatch = client.post("/api/trainings/", other, HTTP_IDEMPOTENCY_KEY="k")

    assert (first.status_code, again.status_code) == (201, 201)
    assert first.json() == again.json()
    assert (mismatch.status_code, mismatch.json()["code"]) == (409, "IDEMPOTENCY_MISMATCH")
    assert Training.objects.count() == 2


def test_a_remembered_request_does_not_give_away_its_password(login, settings) -> None:
    settings.FL_OPEN_REGISTRATION = True
    guess = hashlib.sha256(json.dumps(REGISTRATION, sort_keys=True).encode()).hexdigest()

    login(None).post("/api/users/", REGISTRATION, HTTP_IDEMPOTENCY_KEY="k")
    row = IdempotencyKey.objects.get()
    settings.SECRET_KEY = "another server's"
    User.objects.all().delete()
    login(None).post("/api/users/", REGISTRATION, HTTP_IDEMPOTENCY_KEY="other")

    assert row.body_digest != guess
    assert len({row.body_digest, IdempotencyKey.objects.get(key="other").body_digest}) == 2
    assert "password" not in str(row.answer)


def test_a_key_still_works_while_the_servers_secret_is_rotated(login, settings) -> None:
    running = scene(started=False)
    client, one = login(running.actor), body(running)
    first = client.post("/api/trainings/", one, HTTP_IDEMPOTENCY_KEY="k").json()

    settings.SECRET_KEY, settings.SECRET_KEY_FALLBACKS = "new", [settings.SECRET_KEY]

    assert client.post("/api/trainings/", one, HTTP_IDEMPOTENCY_KEY="k").json() == first


def test_a_refused_request_does_not_use_up_its_key(login) -> None:
    running = scene(started=False)
    client = login(running.actor)

    wrong = client.post(
        "/api/trainings/", body(running, options={"x": 1}), HTTP_IDEMPOTENCY_KEY="k"
    )
    right = client.post("/api/trainings/", body(running), HTTP_IDEMPOTENCY_KEY="k")

    assert (wrong.status_code, right.status_code) == (400, 201)


def test_registration_is_closed_but_for_admins(login) -> None:
    admin = person("root", is_superuser=True)

    assert login(None).post("/api/users/", REGISTRATION).json()["code"] == "REGISTRATION_CLOSED"
    assert login(person("x")).post("/api/users/", REGISTRATION).status_code == 403
    assert login(admin).post("/api/users/", REGISTRATION).status_code == 201


def test_registration_gives_a_token_once(login, settings) -> None:
    settings.FL_OPEN_REGISTRATION = True

    first = login(None).post("/api/users/", REGISTRATION, HTTP_IDEMPOTENCY_KEY="k").json()
    again = login(None).post("/api/users/", REGISTRATION, HTTP_IDEMPOTENCY_KEY="k").json()

    client = login(None)
    client.credentials(HTTP_AUTHORIZATION=f"Token {first['token']}")
    assert client.get("/api/users/myself/").json()["id"] == first["id"] == again["id"]
    assert "token" not in again
    assert User.objects.get().check_password(REGISTRATION["password"])


@pytest.mark.parametrize(
    "field", ["is_superuser", "is_staff", "is_active", "groups", "user_permissions", "id"]
)
def test_nobody_makes_himself_an_admin(login, settings, field: str) -> None:
    settings.FL_OPEN_REGISTRATION = True

    response = login(None).post("/api/users/", {**REGISTRATION, field: True})

    assert (response.status_code, response.json()["code"]) == (400, "PRIVILEGED_FIELD")
    assert not User.objects.exists()


@pytest.mark.parametrize(
    "change",
    [
        {"password": "123"}, {"password": "ada"}, {"username": ""}, {"username": "a b"},
        {"email": "x"}, {"message_endpoint": "ftp://x"}, {"message_endpoint": "javascript:1"},
        {"message_endpoint": "http://:80/"}, {"message_endpoint": "http://x:65536/"},
        {"actor": "maybe"}, {"username": "a" * 200},
    ],
    ids=str,
)  # fmt: skip
def test_a_bad_registration_stores_nothing(login, settings, change) -> None:
    settings.FL_OPEN_REGISTRATION = True

    assert login(None).post("/api/users/", {**REGISTRATION, **change}).status_code == 400
    assert not User.objects.exists()


def test_a_name_that_is_taken_is_400(login, settings) -> None:
    settings.FL_OPEN_REGISTRATION = True
    person("ada")

    response = login(None).post("/api/users/", REGISTRATION)

    assert (response.status_code, response.json()["code"]) == (400, "USERNAME_TAKEN")


def test_how_to_reach_somebody_is_not_for_others(login) -> None:
    running = scene()
    User.objects.filter(pk=running.sites["ada"].pk).update(
        email="ada@site.example", message_endpoint="https://site.example"
    )
    url = f"/api/users/{running.sites['ada'].pk}/"
    ada = User.objects.get(username="ada")

    for viewer, shown in ((running.actor, ""), (ada, "ada@site.example")):
        assert login(viewer).get(url).json()["email"] == shown


def test_tokens_are_listed_without_keys_and_revoked_at_once(login) -> None:
    ada = person("ada")
    client = login(ada)
    key = client.post("/api/users/myself/tokens/", {"label": "laptop"}).json()["token"]
    other = login(None)
    other.credentials(HTTP_AUTHORIZATION=f"Token {key}")
    rows = other.get("/api/users/myself/tokens/").json()

    revoked = client.delete(f"/api/users/myself/tokens/{rows[1]['id']}/")

    assert revoked.status_code == 204
    assert key not in str(rows)
    assert other.get("/api/users/myself/").json()["code"] == "TOKEN_REVOKED"


def test_a_token_whose_answer_was_lost_gets_another_key_and_none_that_lives_is_unknown(
    login,
) -> None:
    client = login(person("ada"))

    def ask(label: str = "laptop") -> Any:
        path, key = "/api/users/myself/tokens/", {"HTTP_IDEMPOTENCY_KEY": "k"}
        return client.post(path, {"label": label}, **key)

    lost, heard = ask().json(), ask().json()
    remembered = IdempotencyKey.objects.get()

    assert lost["id"] == heard["id"] == ApiToken.objects.get(label="laptop").pk
    assert remembered.answer == {"id": heard["id"]}
    with pytest.raises(BadToken):
        token_user(key=lost["token"])
    assert token_user(key=heard["token"]).username == "ada"
    used, other = ask(), ask("phone")
    assert (used.status_code, used.json()["code"]) == (409, "TOKEN_USED")
    assert other.json()["code"] == "IDEMPOTENCY_MISMATCH"
    assert token_user(key=heard["token"]).username == "ada"


def test_who_makes_a_group_is_in_it_and_others_do_not_see_it(login) -> None:
    ada = login(person("ada"))
    group = ada.post("/api/groups/", {"name": "cardiology"}).json()

    assert ada.get("/api/groups/").json() == [group]
    assert login(person("eve")).get(f"/api/groups/{group['id']}/").status_code == 404
    assert ada.post("/api/groups/", {"name": "cardiology"}).json()["code"] == "NAME_TAKEN"


def test_only_an_admin_renames_or_deletes_a_group(login) -> None:
    ada, admin = login(person("ada")), login(person("root", is_superuser=True))
    group = ada.post("/api/groups/", {"name": "cardiology"}).json()
    url = f"/api/groups/{group['id']}/"

    refused = [ada.put(url, {"name": "x"}), ada.patch(url, {"name": "x"}), ada.delete(url)]

    assert {(r.status_code, r.json()["code"]) for r in refused} == {(403, "ADMIN_ONLY")}
    assert ada.get(url).json() == group
    assert admin.patch(url, {"name": "x"}).json()["name"] == "x"
    assert admin.delete(url).status_code == 204


def test_the_catalogue_of_strategies_has_their_options(login) -> None:
    rows = {row["name"]: row for row in login(person("x")).get("/api/aggregators/").json()}

    assert {"FedAvg", "FedProx"} <= set(rows)
    assert rows["FedProx"]["options_schema"]["properties"]["mu"]["type"] == "number"
    assert rows["FedProx"]["paper"]
