"""Joining in and initial weights over HTTP."""

from typing import Any

import pytest
from django.core.files.uploadedfile import SimpleUploadedFile
from safetensors.numpy import load, save

from fl_server_core.models import ClientProfile
from tests.scenes import Scene, person, scene, weights

pytestmark = pytest.mark.django_db
JOIN = "/api/clients/me/join/"


def join(login, running: Scene, site: str, **body: Any):
    return login(running.sites[site]).post(JOIN, body, format="json")


def test_a_client_says_what_it_has_and_learns_what_is_missing(login) -> None:
    running = scene(require={"num_examples": {"min": 100}, "labels": "cat"})

    response = join(
        login, running, "ada", num_examples=50, attributes={"labels": ["dog", "cat"]},
        capabilities=["train"], sdk_version="1.0",
    )  # fmt: skip

    assert response.status_code == 200
    body = response.json()
    assert body["client"] == str(running.sites["ada"].pk)
    assert body["min_protocol"] == 1
    assert body["missing"] == [
        {
            "training": str(running.training.pk),
            "user": str(running.sites["ada"].pk),
            "name": "num_examples",
            "expected": {"min": 100},
            "got": 50,
            "text": "num_examples: at least 100 is required, it says 50",
        }
    ]


def test_the_training_names_what_is_missing_to_its_actor_and_to_each_site_its_own(login) -> None:
    running = scene(require={"gpu": True})
    join(login, running, "ada", attributes={"gpu": True}, num_examples=30)
    url = f"/api/trainings/{running.training.pk}/"

    told = login(running.actor).get(url).json()
    own = login(running.sites["ada"]).get(url).json()

    assert [missing["user"] for missing in told["missing"]] == [str(running.sites["grace"].pk)]
    assert {share["share"] for share in told["shares"]} == {1.0, None}
    assert own["missing"] == []
    assert [share["user"] for share in own["shares"]] == [str(running.sites["ada"].pk)]


@pytest.mark.parametrize(
    "body",
    [
        {"attributes": {"gpu": {"nested": 1}}},
        {"attributes": {"gpu": None}},
        {"attributes": {"x" * 129: 1}},
        {"attributes": {"many": list(range(1001))}},
        {"attributes": {str(n): n for n in range(101)}},
        {"attributes": ["gpu"]},
        {"num_examples": 0},
        {"capabilities": "train"},
        {"atributes": {}},
    ],
)
def test_what_cannot_be_kept_is_refused(login, body) -> None:
    response = join(login, scene("ada"), "ada", **body)

    assert response.status_code == 400
    assert not ClientProfile.objects.exists()


def test_only_clients_join(login) -> None:
    response = login(person("someone")).post(JOIN, {}, format="json")

    assert (response.status_code, response.json()["code"]) == (403, "NOT_A_CLIENT")


def test_a_training_begins_with_the_weights_of_a_client(login) -> None:
    actor, site = person("actor", actor=True), person("site", client=True)
    made = login(actor).post(
        "/api/models/", {"name": "new", "description": "", "initial_weights": "client"}
    )
    assert made.status_code == 201
    model = made.json()["model_id"]
    created = login(actor).post(
        "/api/trainings/",
        {"model_id": model, "target_num_updates": 1, "metric_names": [],
         "aggregation_method": "FedAvg", "clients": [str(site.pk)]},
        format="json",
    )  # fmt: skip
    training = created.json()["training_id"]
    assert login(actor).post(f"/api/trainings/{training}/start/").status_code == 202
    empty = login(actor).get(f"/api/models/{model}/")
    assert (empty.status_code, empty.json()["code"]) == (409, "NO_WEIGHTS")

    task = login(site).get("/api/tasks/").json()["task"]
    form = {
        "meta": '{"num_examples": 1}',
        "model_file": SimpleUploadedFile("w", save(weights(3.0))),
    }
    sent = login(site).post(task["upload_url"], form, format="multipart")

    assert (task["kind"], sent.status_code) == ("initial_weights", 201)
    train = login(site).get("/api/tasks/").json()["task"]
    assert train["kind"] == "train"
    assert train["model"]["sha256"] in sent.json()["detail"]
    got = b"".join(login(site).get(train["model"]["url"]).streaming_content)
    assert load(got)["layer.bias"].tolist() == [3.0] * 3


def test_initial_weights_and_a_file_contradict_each_other(login) -> None:
    form = {
        "name": "new", "description": "", "initial_weights": "client",
        "model_file": SimpleUploadedFile("w", save(weights(3.0))),
    }  # fmt: skip

    response = login(person("actor", actor=True)).post("/api/models/", form, format="multipart")

    assert (response.status_code, response.json()["code"]) == (400, "INITIAL_WEIGHTS")
