"""What sites measure: how much of it, under which names, and what it counts for."""

import json
from typing import Any

import pytest
from django.core.files.uploadedfile import SimpleUploadedFile
from django.db import connection
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from safetensors.numpy import save

from fl_server_ai.services.reconciler import sweep
from fl_server_ai.services.updates import update_submit
from fl_server_core.exceptions import Conflict
from fl_server_core.models import LocalModel, Metric, Round, Task
from fl_server_core.services.metrics import metrics_record
from tests.scenes import Scene, scene, staged, weights

pytestmark = pytest.mark.django_db
BAD_NAMES = ["\ud800", "\x00", "", "k" * 129]


def result(client: Any, task: Task, metrics: dict[str, float], samples: int = 2) -> Any:
    """The response to a task's result; training tasks bring their weights."""
    body: dict[str, Any] = {"meta": json.dumps({"num_examples": samples, "metrics": metrics})}
    if task.kind == "train":
        body["model_file"] = SimpleUploadedFile("w", save(weights(1.0)))
    return client.post(f"/api/tasks/{task.pk}/result/", body, format="multipart")


def form(metrics: dict[str, float], **fields: Any) -> dict[str, Any]:
    return {"metric_names": list(metrics), "metric_values": list(metrics.values()), **fields}


def in_its_test() -> Scene:
    """A training whose first model is being tested."""
    running = scene("ada", "grace", rounds=3)
    for site in running.sites:
        running.send(site, 1.0)
    running.work()
    return running


def in_its_second_test() -> tuple[Scene, Task]:
    """One whose first test ended without ada, and the task that she had in it."""
    running = in_its_test()
    missed = running.task("ada", "evaluate")
    running.report("grace", {"acc": 0.5})
    Round.objects.filter(pk=running.round.pk).update(deadline=timezone.now())
    sweep()
    running.work()
    for site in running.sites:
        running.send(site, 2.0)
    running.work()
    return running, missed


@pytest.mark.parametrize("way", ["result", "update", "metrics"])
def test_a_request_has_at_most_a_thousand_metrics(login, way: str) -> None:
    running = scene()
    client, model = login(running.sites["ada"]), f"/api/models/{running.training.model_id}/"
    many = {f"m{number}": 0.0 for number in range(1001)}

    if way == "result":
        response = result(client, running.task("ada"), many)
    elif way == "update":
        file = SimpleUploadedFile("w", save(weights(1.0)))
        body = form(many, round=0, sample_size=1, model_file=file)
        response = client.post(model, body, format="multipart")
    else:
        response = client.post(f"{model}metrics/", form(many))

    assert (response.status_code, response.json()["code"]) == (400, "TOO_MANY_METRICS")
    assert not LocalModel.objects.exists()
    assert not Metric.objects.exists()


@pytest.mark.parametrize("way", ["result", "metrics"])
def test_a_step_keeps_at_most_a_thousand_metrics_of_each_reporter(login, way: str) -> None:
    running = in_its_test()
    model, url = running.training.model, f"/api/models/{running.training.model_id}/metrics/"
    clients = {site: login(user) for site, user in running.sites.items()}
    before = {f"m{number}": 0.0 for number in range(999)}
    metrics_record(model=running.now.model, reporter=running.sites["ada"], step=1, metrics=before)

    def send(site: str, metrics: dict[str, float]) -> Any:
        if way == "metrics":
            return clients[site].post(url, form(metrics))
        return result(clients[site], running.task(site, "evaluate"), metrics)

    over = send("ada", {"m0": 1.0, "new": 1.0, "another": 1.0})
    stored = Metric.objects.filter(model=model, reporter=running.sites["ada"])
    kept = stored.count(), stored.get(key="m0").value_float
    full = send("ada", {"m0": 1.0, "new": 1.0})
    other = send("grace", {"m0": 1.0})

    assert (over.status_code, over.json()["code"]) == (409, "METRICS_FULL")
    assert kept == (999, 0.0)
    assert (full.status_code, other.status_code) == (201, 201)
    assert stored.count() == 1_000


def test_a_step_keeps_four_megabytes_that_are_no_numbers(login) -> None:
    running = scene()
    client, url = login(running.sites["ada"]), f"/api/models/{running.training.model_id}/metrics/"

    def send(*names: str, size: int = 2**20 - 1) -> int:
        values = [name * size for name in names]
        return client.post(url, {"metric_names": names, "metric_values": values}).status_code

    assert [send("a", "b", "c"), send("d")] == [201, 201]
    assert send("e", size=5) == 409
    assert send("a", "b") == 201  # in the place of what was there
    assert send("e", size=4) == 201


def test_an_update_with_more_than_that_is_refused_before_its_file_is_read(monkeypatch) -> None:
    running = scene()
    monkeypatch.setattr("fl_server_ai.services.updates.update_received", pytest.fail)

    with pytest.raises(Conflict) as caught:
        update_submit(
            model_id=running.training.model_id,
            owner=running.sites["ada"],
            round=0,
            sample_size=1,
            file=staged(save(weights(1.0))),
            sha256=None,
            metrics=dict.fromkeys("abcde", b"x" * 2**20),
        )

    assert caught.value.error_code == "METRICS_FULL"
    assert running.task("ada").state == "open"


@pytest.mark.parametrize("name", BAD_NAMES, ids=["surrogate", "nul", "empty", "long"])
@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_a_result_with_a_name_that_can_not_be_stored_is_refused(login, kind, name: str) -> None:
    running = in_its_test() if kind == "evaluate" else scene()
    before = LocalModel.objects.count()

    response = result(login(running.sites["ada"]), running.task("ada", kind), {name: 0.5})

    assert response.status_code == 400
    assert response.json()["code"] in {"METRIC_NAME", "BAD_META"}
    assert (LocalModel.objects.count(), Metric.objects.count()) == (before, 0)
    assert running.task("ada", kind).state == "open"


def test_a_wrong_value_under_an_unspeakable_name_is_refused_too(login) -> None:
    running = scene()
    meta = '{"num_examples": 1, "metrics": {"\\ud800": "x"}}'

    response = login(running.sites["ada"]).post(
        f"/api/tasks/{running.task('ada').pk}/result/", {"meta": meta}, format="multipart"
    )

    assert (response.status_code, response.json()["code"]) == (400, "BAD_META")


def test_many_metrics_cost_as_many_queries_as_few() -> None:
    running = scene()
    model, ada = running.training.model, running.sites["ada"]

    def count(number: int, value: float) -> int:
        metrics = {f"m{index}": value for index in range(number)}
        with CaptureQueriesContext(connection) as queries:
            metrics_record(model=model, reporter=ada, step=0, metrics=metrics)
        return len(queries)

    few = count(2, 1.0)
    assert count(100, 2.0) <= few + 2  # some are new and some are known
    assert set(Metric.objects.values_list("value_float", flat=True)) == {2.0}
    assert Metric.objects.count() == 100


def test_what_is_sent_again_replaces_what_was_whatever_its_kind() -> None:
    running = scene()
    model, ada = running.training.model, running.sites["ada"]

    for metrics in ({"a": 1.0, "b": b"x"}, {"a": b"y", "b": 2.0, "c": 3.0}):
        metrics_record(model=model, reporter=ada, step=0, metrics=metrics, sample_size=4)

    rows = {row.key: (row.value_float, row.value_binary) for row in Metric.objects.all()}
    assert {key: (value, data and bytes(data)) for key, (value, data) in rows.items()} == {
        "a": (None, b"y"), "b": (2.0, None), "c": (3.0, None),
    }  # fmt: skip


def test_a_late_evaluation_does_not_count_for_the_next_test(login) -> None:
    running, missed = in_its_second_test()

    response = result(login(running.sites["ada"]), missed, {"acc": 0.1})

    assert (response.status_code, response.json()["code"]) == (409, "TASK_CLOSED")
    assert not Metric.objects.filter(reporter=running.sites["ada"]).exists()
    assert running.task("ada", "evaluate").state == "open"


def test_an_evaluation_that_names_its_round_is_not_taken_for_another(login) -> None:
    running, _ = in_its_second_test()
    client = login(running.sites["ada"])
    url = f"/api/models/{running.training.model_id}/metrics/"

    late = client.post(url, form({"acc": 0.1}, round=1))
    right = client.post(url, form({"acc": 0.2}, round=2))

    assert (late.status_code, late.json()["code"]) == (409, "TASK_CLOSED")
    assert right.status_code == 201
    found = Metric.objects.filter(reporter=running.sites["ada"]).values_list("step", "value_float")
    assert list(found) == [(2, 0.2)]


def test_the_same_evaluation_again_is_fine_however_late(login) -> None:
    running = in_its_test()
    task, client = running.task("ada", "evaluate"), login(running.sites["ada"])
    url = f"/api/models/{running.training.model_id}/metrics/"
    result(client, task, {"acc": 0.5})
    running.report("grace", {"acc": 0.5})
    running.work()
    for site in running.sites:
        running.send(site, 2.0)
    running.work()

    assert result(client, task, {"acc": 0.5}).status_code == 201
    assert client.post(url, form({"acc": 0.5}, round=1)).status_code == 201
    assert Metric.objects.filter(reporter=running.sites["ada"]).count() == 1
    assert running.task("ada", "evaluate").state == "open"


def test_the_mean_is_over_those_who_were_asked_and_answered(login) -> None:
    running = in_its_test()
    url = f"/api/models/{running.training.model_id}/metrics/"

    assert login(running.actor).post(url, form({"acc": 0.0})).status_code == 201
    running.report("ada", {"acc": 1.0}, samples=1)
    running.report("grace", {"acc": 0.5}, samples=1)
    running.work()

    mean = Metric.objects.get(identifier=Metric.AGGREGATED)
    assert (mean.value_float, mean.sample_size) == (0.75, 2)
    assert Metric.objects.filter(reporter=running.actor, value_float=0.0).exists()


MISTYPED = [
    "0,85",
    "-1,5e3",
    ",5",
    "1,234",
    "1,234,567.89",
    "1.234,5",
    "1 234",
    "1'234.5",
    "85%",
    "8.5 %",
]


@pytest.mark.parametrize("value", [*MISTYPED, "8,5\u00a0%", "1\u202f234,5"])
def test_a_value_that_is_meant_as_a_number_is_not_taken_for_text(login, value: str) -> None:
    running = scene()
    url = f"/api/models/{running.training.model_id}/metrics/"

    response = login(running.sites["ada"]).post(
        url, {"metric_names": ["accuracy"], "metric_values": [value]}
    )

    assert (response.status_code, response.json()["code"]) == (400, "METRIC_NUMBER")
    assert "decimal point" in response.json()["detail"]
    assert not Metric.objects.exists()


@pytest.mark.parametrize(
    "value",
    ["text", "1.2.3", "192.168.100.100", "1,2,3", "12 34", "a,b", "100 % of it", "2026-01-01"],
)
def test_other_text_is_kept_as_it_is(login, value: str) -> None:
    running = scene()
    url = f"/api/models/{running.training.model_id}/metrics/"

    response = login(running.sites["ada"]).post(
        url, {"metric_names": ["note"], "metric_values": [value]}
    )

    assert response.status_code == 201
    assert bytes(Metric.objects.get(key="note").value_binary or b"") == value.encode()
