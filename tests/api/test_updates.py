"""Models and updates over HTTP: multipart in, ranges and digests out, nothing left of what is refused."""

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from django.conf import settings as django_settings
from django.core.files.uploadedfile import SimpleUploadedFile
from safetensors.numpy import load, save

from fl_server_ai.services.quarantine import update_refuse
from fl_server_core.models import GlobalModel, LocalModel, Metric
from tests.scenes import Scene, person, scene, weights

pytestmark = pytest.mark.django_db


def file(data: bytes) -> SimpleUploadedFile:
    return SimpleUploadedFile("weights", data)


def send(login, running: Scene, site: str = "ada", **fields: Any):
    body = {"round": 0, "sample_size": 2, "model_file": file(save(weights(1.0))), **fields}
    body = {name: value for name, value in body.items() if value is not None}
    url = f"/api/models/{running.training.model_id}/"
    return login(running.sites[site]).post(url, body, format="multipart")


@pytest.fixture(autouse=True)
def empty_staging() -> None:
    folder = Path(django_settings.FL_STAGING_DIR)
    before = {*folder.glob("*"), folder / "rendered"}  # what is kept for the next who asks
    yield
    assert set(folder.glob("*")) <= before, "something was left in staging"


def test_an_update_is_acknowledged_with_how_far_the_round_is(login) -> None:
    running = scene()

    response = send(login, running, metric_names=["loss", "note"], metric_values=["0.0", "ok"])

    assert response.status_code == 201
    body = response.json()
    assert (body["detail"], body["round"], body["received"], body["needed"]) == (
        "Model Update Accepted", 0, 1, 2,
    )  # fmt: skip
    update = LocalModel.objects.get(pk=body["update_id"])
    assert {m.key: m.value_float for m in update.metrics.all()} == {"loss": 0.0, "note": None}


def test_again_is_200_with_the_same_id_and_other_bytes_are_409(login) -> None:
    running = scene()
    first = send(login, running).json()

    again = send(login, running)
    other = send(login, running, model_file=file(save(weights(2.0))))

    assert (again.status_code, again.json()["update_id"]) == (200, first["update_id"])
    assert (other.status_code, other.json()["code"]) == (409, "DUPLICATE")


def test_what_becomes_of_an_update_is_in_the_words_of_the_answer_too(login) -> None:
    running = scene("ada", "grace", max_update_norm=0.5)
    first = send(login, running).json()
    running.work()
    held = send(login, running).json()
    update = LocalModel.objects.get()
    update_refuse(update=update, user=running.actor)
    refused = send(login, running).json()

    assert (first["detail"], first["state"]) == ("Model Update Received", "received")
    assert (held["detail"], held["state"]) == (
        f"Model Update Quarantined: {update.reason}",
        "quarantined",
    )
    assert (refused["detail"], refused["state"]) == (
        f"Model Update Refused: {refused['reason']}",
        "refused",
    )


def test_an_update_for_a_round_that_has_closed_is_told_what_happens_now(login) -> None:
    running = scene("ada", "grace", rounds=2)
    running.send("ada", 1.0)
    running.send("grace", 1.0)
    aggregating = send(login, running, model_file=file(save(weights(9.0)))).json()
    running.work()
    testing = send(login, running, round=1).json()

    assert "round 0 is being aggregated" in aggregating["detail"]
    assert "round 1 takes no updates; the model of round 0 is being tested" in testing["detail"]
    assert {aggregating["code"], testing["code"]} == {"ROUND_CLOSED"}


def test_a_tasks_result_is_the_same_as_posting_to_the_model(login) -> None:
    running = scene()
    task = running.task("ada")
    client = login(running.sites["ada"])
    meta = '{"num_examples": 2, "metrics": {"loss": 0.5}}'

    body = {"meta": meta, "model_file": file(save(weights(1.0)))}
    first = client.post(f"/api/tasks/{task.pk}/result/", body, format="multipart")
    again = send(login, running)

    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json()["update_id"] == again.json()["update_id"]
    assert Metric.objects.get().value_float == 0.5


@pytest.mark.parametrize("announced", [True, False])
def test_what_is_too_large_is_413(login, settings, announced: bool) -> None:
    running = scene()
    settings.FL_MAX_MODEL_BYTES = 100 if not announced else 10
    size = 2_000_000 if announced else 200

    response = send(login, running, model_file=file(bytes(size)))

    assert (response.status_code, response.json()["code"]) == (413, "TOO_LARGE")


def test_an_outsider_is_refused_before_his_file_is_read(login, monkeypatch) -> None:
    running = scene()
    running.sites["eve"] = person("eve", client=True)
    read = []
    monkeypatch.setattr("fl_server_api.uploads.StagedFile.add", lambda *_: read.append(1))

    assert send(login, running, "eve").status_code == 404
    assert not read


def upload(login, actor, data: bytes, **fields: Any):
    body = {"name": "m", "description": "", "model_file": file(data), **fields}
    return login(actor).post("/api/models/", body, format="multipart")


def download(client, path: str, **headers: str) -> tuple[Any, bytes]:
    response = client.get(path, **headers)
    data = b"".join(response.streaming_content) if response.streaming else response.content
    return response, data


def test_a_model_comes_back_in_its_container_and_as_safetensors(login) -> None:
    actor = person("actor", actor=True)
    buffer = io.BytesIO()
    np.savez(buffer, **weights(3.0))
    model = upload(login, actor, buffer.getvalue()).json()["model_id"]
    client = login(actor)

    response, data = download(client, f"/api/models/{model}/")
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        assert arrays["layer.bias"].tolist() == [3.0] * 3
    assert f"model-{model}.pt" in response["Content-Disposition"]
    for path, headers in (
        (f"/api/models/{model}/?format=safetensors", {}),
        (f"/api/models/{model}/", {"HTTP_ACCEPT": "application/vnd.safetensors"}),
        (f"/api/models/{model}/?format=safetensors", {"HTTP_ACCEPT": "application/octet-stream"}),
    ):
        response, data = download(client, path, **headers)
        assert load(data)["layer.bias"].tolist() == [3.0] * 3
        assert response["ETag"] == f'"{hashlib.sha256(data).hexdigest()}"'


def test_downloads_can_be_conditional_and_partial(login) -> None:
    running = scene()
    client = login(running.sites["ada"])
    path = f"/api/models/{running.training.model_id}/"
    whole, data = download(client, path)

    tag = whole["ETag"]
    matching = [tag, f'"old", {tag}', f"W/{tag}", "*"]  # RFC 9110, 13.1.2: compared weakly
    nothing = [download(client, path, HTTP_IF_NONE_MATCH=tags) for tags in matching]
    other, anew = download(client, path, HTTP_IF_NONE_MATCH='W/"old"')
    part, middle = download(client, path, HTTP_RANGE="bytes=5-9")
    tail, end = download(client, path, HTTP_RANGE="bytes=-7")
    stale, all_of_it = download(client, path, HTTP_RANGE="bytes=5-9", HTTP_IF_RANGE='"old"')
    beyond, _ = download(client, path, HTTP_RANGE=f"bytes={len(data)}-")

    assert [(known.status_code, sent) for known, sent in nothing] == [(304, b"")] * len(matching)
    assert (other.status_code, anew) == (200, data)
    assert (part.status_code, middle) == (206, data[5:10])
    assert part["Content-Range"] == f"bytes 5-9/{len(data)}"
    assert (tail.status_code, end) == (206, data[-7:])
    assert (stale.status_code, all_of_it) == (200, data)
    assert (beyond.status_code, beyond["Content-Range"]) == (416, f"bytes */{len(data)}")


def test_every_version_stays_downloadable(login) -> None:
    running = scene(skip_model_tests=True)
    running.send("ada", 1.0)
    running.send("grace", 1.0)
    running.work()
    client = login(running.actor)
    path = f"/api/models/{running.training.model_id}/"

    old, new = (load(download(client, f"{path}?version={n}")[1]) for n in (0, 1))

    assert (old["layer.bias"][0], new["layer.bias"][0]) == (0.0, 1.0)
    for wrong in ("2", "x", "9" * 99, "-1"):
        assert client.get(f"{path}?version={wrong}").status_code == 404


def test_an_updates_file_is_for_its_owner_and_the_actor_while_it_is_kept(login) -> None:
    running = scene(skip_model_tests=True)
    update = send(login, running).json()["update_id"]
    path = f"/api/models/{update}/"

    assert download(login(running.actor), path)[0].status_code == 200
    assert download(login(running.sites["ada"]), path)[0].status_code == 200
    assert login(running.sites["grace"]).get(path).status_code == 404
    running.send("grace", 1.0)
    running.work()
    assert login(running.actor).get(path).json()["code"] == "FILE_DELETED"


def test_lists_hold_no_bytes_and_metadata_no_guesses(login) -> None:
    running = scene()
    send(login, running)
    client = login(running.sites["ada"])

    rows = client.get("/api/models/").json()
    metadata = client.get(f"/api/models/{running.training.model_id}/metadata/").json()

    assert {row["id"] for row in rows} == {
        str(running.training.model_id), str(LocalModel.objects.get().pk),
    }  # fmt: skip
    assert rows[1]["base_model"] == str(running.training.model_id)
    assert metadata["stats"]["total_mult_adds"] is None  # weights alone do not say
    assert metadata["has_preprocessing"] is False


def test_preprocessing_is_kept_as_it_came(login) -> None:
    actor = person("actor", actor=True)
    data = save({"mean": np.zeros(3, np.float32)}, metadata={"by": "me"})
    model = upload(login, actor, save(weights())).json()["model_id"]
    path = f"/api/models/{model}/preprocessing/"
    client = login(actor)

    assert client.get(path).json()["code"] == "NO_PREPROCESSING"
    sent = client.post(path, {"model_preprocessing_file": file(data)}, format="multipart")
    assert sent.status_code == 202
    assert download(client, path)[1] == data


def test_a_mean_of_no_models_is_refused(login) -> None:
    response = upload(login, person("actor", actor=True), save(weights()), type="MEAN")

    assert (response.status_code, response.json()["code"]) == (400, "BAD_MEMBERS")
    assert not GlobalModel.objects.exists()


def test_input_shape_may_have_free_dimensions(login) -> None:
    actor = person("actor", actor=True)

    response = upload(login, actor, save(weights()), input_shape=["None", "3", "null"])

    model = GlobalModel.objects.get(pk=response.json()["model_id"])
    assert model.input_shape == [None, 3, None]


@pytest.mark.parametrize("size", [0, 2**31 + 1, 10**30, -(10**30)])
def test_a_sample_size_beyond_the_limit_is_told_the_limit(login, size: int) -> None:
    response = send(login, scene(), sample_size=size)

    assert response.status_code in {400, 422}
    assert "it is how many examples were trained on, 1 to 2147483648" in response.json()["detail"]
