"""Participation, metrics, versions and events of a training over HTTP."""

import csv
import json
from datetime import timedelta

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from fl_server_ai.services import watching
from fl_server_ai.services.reconciler import sweep
from fl_server_ai.services.tasks import task_failure, task_next
from fl_server_api.views import results
from fl_server_core.models import Round
from tests.scenes import Scene, scene

pytestmark = pytest.mark.django_db


def at(running: Scene, name: str = "") -> str:
    return f"/api/trainings/{running.training.pk}/{name}"


@pytest.fixture
def gapped() -> Scene:
    """Completed in one round: ada delivered, grace failed, joan was late."""
    running = scene("ada", "grace", "joan", rounds=1, skip_model_tests=True)
    task_next(user=running.sites["ada"])
    running.send("ada", 1.0, samples=7)
    task_failure(task=running.task("grace"), user=running.sites["grace"], code="OOM", text="x")
    Round.objects.update(deadline=timezone.now() - timedelta(seconds=1))
    sweep()
    running.work()
    return running


def test_a_round_says_who_was_asked_started_was_accepted_and_excluded_and_why(
    login, gapped
) -> None:
    (round,) = login(gapped.actor).get(at(gapped, "rounds/")).json()

    assert (round["asked"], round["started"], round["received"]) == (3, 1, 1)
    excluded = {one["user"]: (one["part"], one["code"]) for one in round["excluded"]}
    assert excluded == {
        str(gapped.sites["grace"].pk): ("failed", "OOM"),
        str(gapped.sites["joan"].pk): ("late", "DEADLINE"),
    }
    parts = {one["user"]: one for one in round["participation"]}
    own = parts[str(gapped.sites["ada"].pk)]
    assert (own["part"], own["update_state"], own["sample_size"]) == ("done", "consumed", 7)
    assert round["seconds"] >= 0


def test_other_sites_do_not_learn_sample_sizes_or_when_somebody_was_seen(login, gapped) -> None:
    (round,) = login(gapped.sites["grace"]).get(at(gapped, "rounds/")).json()

    parts = {one["user"]: one for one in round["participation"]}
    other = parts[str(gapped.sites["ada"].pk)]
    assert (other["sample_size"], other["last_seen"]) == (None, None)
    assert other["part"] == "done"


def test_completed_differs_from_completed_with_gaps(login, gapped) -> None:
    client = login(gapped.actor)

    assert client.get(at(gapped)).json()["outcome"] == "completed_with_gaps"
    assert client.get("/api/trainings/").json()[0]["outcome"] == "completed_with_gaps"
    gapped.round.tasks.update(state="done")
    assert client.get(at(gapped)).json()["outcome"] == "completed"
    assert client.get("/api/trainings/").json()[0]["outcome"] == "completed"


def test_a_training_tells_what_it_waits_for(login) -> None:
    running = scene()

    found = login(running.actor).get(at(running)).json()

    assert found["outcome"] is None
    assert found["blocked_on"]["code"] == "UPDATES"
    assert {who["name"] for who in found["blocked_on"]["who"]} == {"ada", "grace"}
    assert set(found["blocked_on"]) == {"code", "since", "until", "then", "who", "eta", "text"}


def test_many_participants_cost_as_many_queries_as_few(login) -> None:
    few = scene(*"ab")
    client = login(few.actor)
    counts = []
    for url in (at(few), at(few, "rounds/")):
        client.get(url)
        with CaptureQueriesContext(
            connection,
        ) as queries:
            client.get(url)
        counts.append(len(queries))

    assert counts[0] <= 22
    assert counts[1] <= 10


def after_a_test() -> Scene:
    running = scene(rounds=1)
    for site, value in (("ada", 1.0), ("grace", 3.0)):
        running.send(site, value, samples=2)
    running.work()
    for site, value in (("ada", 0.5), ("grace", 1.5)):
        running.report(site, {"=loss": value})
    running.work()
    return running


def test_metrics_come_per_site_and_aggregated(login) -> None:
    running = after_a_test()

    rows = login(running.actor).get(at(running, "metrics/")).json()
    own = login(running.sites["ada"]).get(at(running, "metrics/")).json()

    assert {(row["kind"], row["site"], row["value"]) for row in rows} == {
        ("test", "ada", 0.5),
        ("test", "grace", 1.5),
        ("aggregated", "", 1.0),
    }
    assert {row["site"] for row in own} == {"ada", ""}


def test_a_csv_has_pages_where_they_are_asked_for(login) -> None:
    running = after_a_test()
    client = login(running.actor)

    answer = client.get(at(running, "metrics/?format=csv&page_size=1"))

    assert len(b"".join(answer.streaming_content).splitlines()) == 2  # with the names
    assert client.get(at(running, "metrics/?format=csv&page_size=no")).status_code == 400


def test_metrics_come_as_csv_that_no_spreadsheet_runs(login) -> None:
    running = after_a_test()

    answer = login(running.actor).get(at(running, "metrics/?format=csv&identifier=aggregated"))
    text = b"".join(answer.streaming_content).decode()
    rows = list(csv.DictReader(text.splitlines()))

    assert answer["Content-Type"].startswith("text/csv")
    assert [(row["key"], row["value"], row["kind"]) for row in rows] == [
        ("'=loss", "1.0", "aggregated")
    ]
    assert login(running.actor).get(at(running, "metrics/?format=xml")).status_code == 400


def test_versions_name_digest_and_what_they_came_of(login, gapped) -> None:
    newest, first = login(gapped.sites["ada"]).get(at(gapped, "versions/")).json()

    assert (newest["number"], newest["based_on"], newest["num_updates"]) == (1, 0, 1)
    assert newest["sha256"] == gapped.digest()
    assert (first["number"], first["based_on"], first["strategy"]) == (0, None, "")
    body = b"".join(login(gapped.actor).get(newest["url"]).streaming_content)
    assert len(body) == newest["bytes"]
    refused = login(gapped.actor).get(newest["url"] + "&format=pickle")
    assert (refused.status_code, refused.json()["code"]) == (400, "BAD_FORMAT")


def events(answer) -> list[tuple[str, object]]:
    text = b"".join(answer.streaming_content).decode()
    found = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if ": " in line)
        if "event" in fields:
            found.append((fields["event"], json.loads(fields["data"]), fields.get("id")))
    return found


def test_events_tell_each_change_once_and_end_with_the_training(login, monkeypatch) -> None:
    running = scene(rounds=1, skip_model_tests=True)
    steps = iter(
        [
            lambda: None,
            lambda: running.send("ada", 1.0),
            lambda: running.send("grace", 1.0),
            lambda: running.work(),
        ]
    )
    monkeypatch.setattr(watching.wakeups, "wait", lambda user, seen, seconds, stop: next(steps)())

    answer = login(running.actor).get(at(running, "events/"))
    told = events(answer)

    assert answer["Content-Type"] == "text/event-stream"
    assert [(name, data.get("local_models_arrived")) for name, data, _ in told[:-1]] == [
        ("training", 0),
        ("training", 1),
        ("training", 2),
        ("training", 2),
    ]
    assert [data["state"] for _, data, _ in told[:-1]] == ["O", "O", "O", "C"]
    assert told[-1][:2] == ("end", "C")


def test_events_that_one_has_are_not_told_again(login, gapped) -> None:
    client = login(gapped.actor)
    (_, _, last), _ = events(client.get(at(gapped, "events/")))

    told = events(client.get(at(gapped, "events/"), HTTP_LAST_EVENT_ID=last))

    assert [name for name, _, _ in told] == ["end"]


def test_where_too_many_watch_there_is_one_look(login, settings, monkeypatch) -> None:
    settings.FL_TRANSFER_THREADS = 0
    running = scene()

    told = events(login(running.actor).get(at(running, "events/")))

    assert [name for name, _, _ in told] == ["training"]


def test_who_is_taken_out_sees_the_stream_end(login, monkeypatch) -> None:
    running = scene()
    gone = running.sites["ada"]
    monkeypatch.setattr(
        watching.wakeups,
        "wait",
        lambda user, seen, seconds, stop: gone.memberships.update(removed_at=timezone.now()),
    )

    told = events(login(gone).get(at(running, "events/")))

    assert [name for name, _, _ in told] == ["training"]
    assert results.STREAM_SECONDS <= 600
