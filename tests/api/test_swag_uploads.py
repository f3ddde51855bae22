"""Moments over HTTP: two files in, the combined ones out."""

import hashlib
from typing import Any

import numpy as np
import pytest
from django.core.files.uploadedfile import SimpleUploadedFile
from safetensors.numpy import load, save

from fl_server_core.models import SwagMoments
from tests.scenes import Scene, person, scene

pytestmark = pytest.mark.django_db
FIRST = {"layer.bias": np.array([1.0, 2.0, 3.0])}
SECOND = {"layer.bias": np.array([2.0, 4.0, 9.5])}


def form(first: dict[str, Any] = FIRST, second: dict[str, Any] = SECOND, **fields: Any) -> Any:
    return {
        "round": 1, "sample_size": 2,
        "first_moment_file": SimpleUploadedFile("first", save(first)),
        "second_moment_file": SimpleUploadedFile("second", save(second)),
        **fields,
    }  # fmt: skip


@pytest.fixture
def running() -> Scene:
    found = scene(rounds=1, uncertainty="SWAG", skip_model_tests=True)
    found.send("ada", 1.0)
    found.send("grace", 3.0)
    found.work()
    return found


def test_the_whole_way(login, running: Scene) -> None:
    path = f"/api/models/{running.training.model_id}/swag/"
    ada = login(running.sites["ada"])
    task = ada.get("/api/tasks/").json()["task"]
    assert (task["kind"], task["round"], task["upload_url"]) == ("swag", 1, path)
    assert ada.get(f"{path}?moment=first").json()["code"] == "NO_MOMENTS"

    for site in running.sites:
        sent = login(running.sites[site]).post(path, form(), format="multipart")
        assert sent.status_code == 201
    again = ada.post(path, form(), format="multipart")
    running.work()

    assert again.status_code == 200
    response = ada.get(f"{path}?moment=second")
    data = b"".join(response.streaming_content)
    np.testing.assert_array_equal(load(data)["layer.bias"], SECOND["layer.bias"])
    assert response["ETag"] == f'"{hashlib.sha256(data).hexdigest()}"'
    assert login(running.actor).get(f"/api/trainings/{running.training.pk}/").json()["state"] == "C"
    assert login(person("stranger", client=True)).get(f"{path}?moment=first").status_code == 404


@pytest.mark.parametrize(
    ("fields", "status", "code"),
    [
        ({"round": 0}, 409, "ROUND_CLOSED"),
        ({"sample_size": 0}, 422, "SAMPLE_SIZE"),
        ({"second_moment_file": None}, 400, "INVALID"),
        ({"first_moment_file": SimpleUploadedFile("f", b"x" * 50)}, 415, "UNKNOWN_CONTAINER"),
        (form(second={"layer.bias": np.zeros(3)}), 422, "MOMENTS_INCONSISTENT"),
        (form(first={"other": np.zeros(3)}), 422, "KEY_MISMATCH"),
    ],
    ids=["round", "samples", "one file", "bytes", "inconsistent", "names"],
)
def test_what_is_wrong_is_named(
    login, running: Scene, fields: dict[str, Any], status: int, code: str
) -> None:
    body = {name: value for name, value in {**form(), **fields}.items() if value is not None}
    path = f"/api/models/{running.training.model_id}/swag/"

    response = login(running.sites["ada"]).post(path, body, format="multipart")

    assert (response.status_code, response.json()["code"]) == (status, code)
    assert not SwagMoments.objects.exists()
    assert login(running.sites["ada"]).get(f"{path}?moment=third").status_code == 400


def test_deviations_are_asked_for_taken_and_given_back(login) -> None:
    running = scene(rounds=1, uncertainty="SWAG", skip_model_tests=True, swag_rank=3)
    running.send("ada", 1.0)
    running.send("grace", 3.0)
    running.work()
    path = f"/api/models/{running.training.model_id}/swag/"
    ada = login(running.sites["ada"])
    columns = {"layer.bias": np.array([[1, 0, 0], [0, 1, 0], [-1, -1, 0]], np.float32)}

    config = ada.get("/api/tasks/").json()["task"]["config"]
    four = SimpleUploadedFile("d", save({"layer.bias": np.ones((4, 3), np.float32)}))
    refused = ada.post(path, form(deviations_file=four), format="multipart")
    statuses = [
        login(running.sites[site]).post(
            path, form(deviations_file=SimpleUploadedFile("d", save(columns))), format="multipart"
        ).status_code
        for site in ("ada", "ada", "grace")
    ]  # fmt: skip
    running.work()
    response = ada.get(f"{path}?moment=deviations")

    assert config["swag_rank"] == 3
    assert (refused.status_code, refused.json()["code"]) == (422, "DEVIATIONS")
    assert statuses == [201, 200, 201]
    found = load(b"".join(response.streaming_content))["layer.bias"].astype(np.float64)
    # Both sites sent the same: their covariance is the one of each; means are equal, nothing is between.
    expected = columns["layer.bias"].T @ columns["layer.bias"] / 2
    np.testing.assert_allclose(found.T @ found / 2, expected, atol=1e-6)


def test_a_round_without_deviations_says_so(login, running: Scene) -> None:
    path = f"/api/models/{running.training.model_id}/swag/"
    for site in running.sites:
        login(running.sites[site]).post(path, form(), format="multipart")
    running.work()

    answer = login(running.actor).get(f"{path}?moment=deviations")

    assert (answer.status_code, answer.json()["code"]) == (404, "NO_DEVIATIONS")


def test_a_swag_model_is_uploaded_with_its_type(login) -> None:
    body = {
        "name": "m", "description": "-", "type": "SWAG",
        "model_file": SimpleUploadedFile("m", save({"w": np.zeros(2, np.float32)})),
    }  # fmt: skip
    client = login(person("actor", actor=True))

    answer = client.post("/api/models/", body, format="multipart")

    assert answer.status_code == 201
    rows = client.get("/api/models/").json()
    assert rows[0]["type"] == "SWAG"
