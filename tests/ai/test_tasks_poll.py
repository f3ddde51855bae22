"""What a client is told to do, in every situation; waiting for it, reporting on it, giving it up."""

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from django.db import connection
from django.utils import timezone

from fl_server_ai.notifications import wakeups
from fl_server_ai.services import tasks
from fl_server_ai.services.quarantine import update_refuse
from fl_server_ai.services.tasks import task_failure, task_next, task_progress, task_wait
from fl_server_ai.services.trainings import (
    training_clients_remove,
    training_create,
    training_start,
)
from fl_server_core.exceptions import Invalid, NotFound
from fl_server_core.lifecycle import RoundPhase, TaskState, TrainingState, move
from fl_server_core.models import LocalModel, Task, Training, User
from tests.scenes import Scene, person, scene

pytestmark = pytest.mark.django_db
ENOUGH = 20.0


def ask(told: Scene, site: str) -> dict[str, Any]:
    return task_next(user=told.sites[site])


def model_of(told: Scene) -> dict[str, Any]:
    version = told.now.model.weights
    return {
        "id": str(told.training.model_id),
        "version": version.number,
        "url": f"/api/models/{told.training.model_id}/?version={version.number}",
        "sha256": version.blob.digest,
        "bytes": version.blob.size,
        "container": "safetensors",
    }


# --- a task -----------------------------------------------------------------------------------


def test_a_participant_is_asked_to_train() -> None:
    told = scene(rounds=3, client_config={"epochs": 2})

    answer = ask(told, "ada")

    task, deadline = told.task("ada"), told.round.deadline
    assert deadline is not None
    assert answer == {
        "state": "task",
        "task": {
            "id": str(task.pk),
            "kind": "train",
            "training": str(told.training.pk),
            "round": 0,
            "model": model_of(told),
            "extras": None,
            "own_updates": {"unused": [], "undecided": []},
            "upload_url": f"/api/models/{told.training.model_id}/",
            "config": {"epochs": 2, "round": 0, "rounds": 3},
            "created_at": task.created_at.isoformat(),
            "deadline": deadline.isoformat(),
        },
    }
    assert told.model.weights.blob.digest == told.digest()


def test_the_strategy_has_the_last_word_on_what_its_clients_do() -> None:
    told = scene(method="FedProx", mu=0.25, client_config={"mu": 9.0, "epochs": 2})

    config = ask(told, "ada")["task"]["config"]

    assert (config["mu"], config["epochs"]) == (0.25, 2)


def test_asking_again_gives_the_same_task_and_notes_only_the_first_time() -> None:
    told = scene()

    first = ask(told, "ada")
    fetched = told.task("ada").fetched_at
    again = ask(told, "ada")

    assert first == again
    assert fetched is not None
    assert told.task("ada").fetched_at == fetched
    assert told.task("grace").fetched_at is None


def test_a_participant_is_asked_to_evaluate_the_new_model() -> None:
    told = scene(rounds=2)
    told.send("ada", 1.0)
    told.send("grace", 3.0)
    told.work()

    task = ask(told, "ada")["task"]

    assert (task["kind"], task["round"]) == ("evaluate", 1)
    assert task["model"] == model_of(told)
    assert task["model"]["version"] == 1
    assert task["upload_url"] == f"/api/models/{told.training.model_id}/metrics/"


def test_of_several_trainings_the_oldest_task_comes_first() -> None:
    told = scene("ada")
    another = training_create(
        actor=told.actor,
        model=told.model,
        target_num_updates=1,
        aggregation_method="FedAvg",
        options={},
        clients=[told.sites["ada"].pk],
    )
    training_start(training=another, user=told.actor)

    assert ask(told, "ada")["task"]["training"] == str(told.training.pk)
    told.send("ada", 1.0)
    assert ask(told, "ada")["task"]["training"] == str(another.pk)


def test_a_task_costs_few_queries(django_assert_num_queries: Callable[[int], Any]) -> None:
    told = scene()

    with django_assert_num_queries(2):
        assert ask(told, "ada")["state"] == "task"
    with django_assert_num_queries(1):
        assert ask(told, "ada")["state"] == "task"


# --- waiting ----------------------------------------------------------------------------------


def reason(told: Scene, site: str) -> str:
    answer = ask(told, site)
    assert (answer["state"], answer["retry_after"]) == ("wait", 2.0)
    return str(answer["reason"])


def test_who_takes_part_in_nothing_waits() -> None:
    assert task_next(user=person("nobody", client=True)) == {
        "state": "wait",
        "retry_after": 2.0,
        "reason": "you are not in any training yet",
    }


def test_an_account_that_no_training_may_ask_is_told_so_instead_of_waiting_for_ever() -> None:
    answer = task_wait(user=person("rosalind", actor=True), seconds=ENOUGH * 1000)

    assert (answer["state"], answer["code"]) == ("wait", "NOT_A_CLIENT")
    assert "not registered as a client" in answer["reason"]


def test_whose_client_role_was_taken_away_still_hears_how_it_ended() -> None:
    told = scene("ada")
    User.objects.filter(pk=told.sites["ada"].pk).update(client=False)

    assert task_next(user=User.objects.get(username="ada"))["state"] == "task"


def test_before_the_start_everybody_waits() -> None:
    told = scene(started=False)

    assert reason(told, "ada") == f"training {told.training.pk} has not started yet"


def test_before_the_start_of_several_a_site_hears_how_many_and_which_one_has_ended() -> None:
    told = scene("ada")
    move(told.now, TrainingState.CANCELLED)
    for _ in range(2):
        training_create(
            actor=told.actor,
            model=told.model,
            target_num_updates=1,
            aggregation_method="FedAvg",
            options={},
            clients=[told.sites["ada"].pk],
        )

    said = reason(told, "ada")

    assert said.startswith("2 trainings have not started yet, such as ")
    assert said.endswith(f"; training {told.training.pk} is cancelled")


def test_who_has_sent_an_update_waits_for_the_others() -> None:
    told = scene()
    told.send("ada", 1.0)

    assert reason(told, "ada") == "round 0 waits for others: 1 of 2 updates are in"


def test_while_the_server_aggregates_everybody_waits() -> None:
    told = scene("ada")
    told.send("ada", 1.0)

    assert reason(told, "ada") == "round 0 is being aggregated"


def test_who_has_tested_waits_for_the_others() -> None:
    told = scene(rounds=2)
    told.send("ada", 1.0)
    told.send("grace", 1.0)
    told.work()
    told.report("ada", {"accuracy": 0.5})

    assert reason(told, "ada") == "the test waits for others: 1 of 2 answers are in"


def test_a_paused_training_asks_for_nothing() -> None:
    told = scene("ada")
    move(told.now, TrainingState.PAUSED)

    assert reason(told, "ada") == f"training {told.training.pk} is paused"


def test_a_task_that_failed_is_not_handed_out_again() -> None:
    told = scene()
    task_failure(task=told.task("ada"), user=told.sites["ada"], code="OOM", text="too big")

    assert reason(told, "ada") == "round 0 waits for others: 0 of 2 updates are in"


def test_waiting_costs_few_queries_however_many_trainings_there_were(
    django_assert_max_num_queries: Callable[[int], Any],
) -> None:
    told = scene("ada")
    for _ in range(5):
        training_create(
            actor=told.actor,
            model=told.model,
            target_num_updates=1,
            aggregation_method="FedAvg",
            options={},
            clients=[told.sites["ada"].pk],
        )
    told.send("ada", 1.0)

    with django_assert_max_num_queries(4):
        assert reason(told, "ada") == "round 0 is being aggregated"


# --- the end ----------------------------------------------------------------------------------


def finished() -> Scene:
    told = scene("ada", rounds=1, skip_model_tests=True)
    told.send("ada", 2.0)
    told.work()
    assert told.now.state == TrainingState.COMPLETED
    return told


def test_when_everything_has_ended_the_final_model_is_named(
    django_assert_max_num_queries: Callable[[int], Any],
) -> None:
    told = finished()

    with django_assert_max_num_queries(3):
        answer = ask(told, "ada")

    assert answer == {
        "state": "done",
        "final_model": model_of(told),
        "training": str(told.training.pk),
        "training_state": "C",
        "reason": f"training {told.training.pk} is completed",
    }
    assert answer["final_model"]["version"] == 1


def test_a_training_that_failed_ends_with_its_reason() -> None:
    told = scene("ada")
    task_failure(task=told.task("ada"), user=told.sites["ada"], code="OOM", text="too big")

    answer = ask(told, "ada")

    assert (answer["state"], answer["training_state"]) == ("done", "E")
    assert answer["reason"].startswith("NOT_ENOUGH_UPDATES")


def test_the_newest_end_is_told_even_if_another_training_never_had_one() -> None:
    """A row without an end sorts first on PostgreSQL and last on SQLite; neither decides."""
    told = finished()
    another = training_create(
        actor=told.actor,
        model=told.model,
        target_num_updates=1,
        aggregation_method="FedAvg",
        options={},
        clients=[told.sites["ada"].pk],
    )
    Training.objects.filter(pk=another.pk).update(state=TrainingState.CANCELLED)

    assert ask(told, "ada")["training"] == str(told.training.pk)


def test_while_one_training_goes_on_nothing_is_done() -> None:
    told = finished()
    training_create(
        actor=told.actor,
        model=told.model,
        target_num_updates=1,
        aggregation_method="FedAvg",
        options={},
        clients=[told.sites["ada"].pk],
    )

    assert ask(told, "ada")["state"] == "wait"


def test_who_was_taken_out_is_done_and_gets_no_model() -> None:
    told = scene()
    training_clients_remove(
        training=told.training, user=told.actor, clients=[told.sites["grace"].pk]
    )

    assert ask(told, "grace") == {
        "state": "done",
        "training": str(told.training.pk),
        "training_state": "O",
        "reason": f"you were taken out of training {told.training.pk}",
    }
    assert ask(told, "ada")["state"] == "task"


# --- long polls -------------------------------------------------------------------------------


def test_a_poll_that_may_not_wait_answers_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wakeups, "wait", refuse)
    told = scene("ada", started=False)

    for seconds in (0.0, -5.0):
        assert task_wait(user=told.sites["ada"], seconds=seconds)["state"] == "wait"


def refuse(*_: object) -> None:
    raise AssertionError("it waits")


def test_a_poll_with_something_to_say_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wakeups, "wait", refuse)
    told = scene("ada")

    assert task_wait(user=told.sites["ada"], seconds=20.0)["state"] == "task"
    told.training.memberships.update(removed_at=timezone.now())
    Task.objects.update(state=TaskState.CANCELLED)
    assert task_wait(user=told.sites["ada"], seconds=20.0)["state"] == "done"


def test_a_poll_waits_no_longer_than_the_server_allows(
    monkeypatch: pytest.MonkeyPatch, settings: Any
) -> None:
    settings.FL_POLL_SECONDS = 0.05
    told = scene("ada", started=False)
    asked: list[float] = []

    def wait(_user: str, _seen: int, seconds: float) -> None:
        asked.append(seconds)
        threading.Event().wait(seconds)

    monkeypatch.setattr(wakeups, "wait", wait)

    assert task_wait(user=told.sites["ada"], seconds=1e9)["state"] == "wait"
    assert asked
    assert max(asked) <= 0.05


@pytest.mark.django_db(transaction=True)
def test_a_waiting_poll_holds_no_connection_and_no_place_at_the_gate(
    monkeypatch: pytest.MonkeyPatch, settings: Any
) -> None:
    told = scene("ada", started=False)
    held: list[object] = []
    free: list[bool] = []
    monkeypatch.setattr(wakeups, "gate", threading.Semaphore(1))

    def wait(_user: str, _seen: int, seconds: float) -> None:
        held.append(connection.connection)
        free.append(wakeups.gate.acquire(blocking=False))
        wakeups.gate.release()
        settings.FL_POLL_SECONDS = 0
        training_start(training=told.training, user=told.actor)

    monkeypatch.setattr(wakeups, "wait", wait)

    assert task_wait(user=told.sites["ada"], seconds=20.0)["state"] == "task"
    assert (held, free) == ([None], [True])


@pytest.mark.django_db(transaction=True)
def test_a_waiting_poll_is_answered_as_soon_as_there_is_a_task(
    monkeypatch: pytest.MonkeyPatch, settings: Any
) -> None:
    settings.FL_POLL_SECONDS = 60
    monkeypatch.setattr(wakeups, "LOOK_SECONDS", 3_600.0)  # only the commit wakes it
    told = scene("ada", started=False)
    answers: list[dict[str, Any]] = []
    poll = waiting_poll(told.sites["ada"], answers)

    training_start(training=told.training, user=told.actor)

    poll.join(ENOUGH)
    assert [answer["state"] for answer in answers] == ["task"]


@pytest.mark.django_db(transaction=True)
def test_a_waiting_poll_hears_of_a_removal(monkeypatch: pytest.MonkeyPatch, settings: Any) -> None:
    settings.FL_POLL_SECONDS = 60
    monkeypatch.setattr(wakeups, "LOOK_SECONDS", 3_600.0)
    told = scene("ada", "grace", started=False)
    answers: list[dict[str, Any]] = []
    poll = waiting_poll(told.sites["ada"], answers)

    training_clients_remove(training=told.training, user=told.actor, clients=[told.sites["ada"].pk])

    poll.join(ENOUGH)
    assert [answer["state"] for answer in answers] == ["done"]


def waiting_poll(user: User, answers: list[dict[str, Any]]) -> threading.Thread:
    """A poll in a thread of its own, once it waits."""
    thread = threading.Thread(
        target=lambda: answers.append(task_wait(user=user, seconds=60.0)), daemon=True
    )
    thread.start()
    pause = threading.Event()
    for _ in range(2_000):
        with wakeups._condition:
            if wakeups._waiting:
                return thread
        pause.wait(0.01)
    raise AssertionError("it never waits")


@pytest.mark.django_db(transaction=True)
def test_what_changes_between_looking_and_waiting_is_not_missed(
    monkeypatch: pytest.MonkeyPatch, settings: Any
) -> None:
    settings.FL_POLL_SECONDS = 60
    monkeypatch.setattr(wakeups, "LOOK_SECONDS", 3_600.0)
    told = scene("ada", started=False)
    look = tasks.task_next
    answers: list[dict[str, Any]] = []

    def look_then_start(*, user: User) -> dict[str, Any]:
        answer = look(user=user)
        if answer["state"] == "wait":
            training_start(training=told.training, user=told.actor)
        return answer

    monkeypatch.setattr(tasks, "task_next", look_then_start)
    poll = threading.Thread(
        target=lambda: answers.append(task_wait(user=told.sites["ada"], seconds=60.0)), daemon=True
    )
    poll.start()
    poll.join(ENOUGH)

    assert [answer["state"] for answer in answers] == ["task"]


# --- progress and failure ---------------------------------------------------------------------


def test_progress_is_stored_and_answered_with_the_deadline() -> None:
    told = scene()
    deadline = told.round.deadline
    assert deadline is not None

    for step in (1, 1, 2):
        answer = task_progress(
            task=told.task("ada"),
            user=told.sites["ada"],
            step=step,
            of=10,
            metrics={"loss": 0.5},
            timings={"fetch": 1.5},
        )
        assert answer == {"command": None, "deadline": deadline.isoformat()}

    task = told.task("ada")
    assert task.progress_at is not None
    assert task.progress == {
        "step": 2,
        "of": 10,
        "metrics": {"loss": 0.5},
        "timings": {"fetch": 1.5},
    }


def test_a_client_is_told_to_stop_when_its_task_is_over() -> None:
    told = scene()
    task = told.task("ada")
    move(told.task("ada"), TaskState.EXPIRED)

    answer = task_progress(task=task, user=told.sites["ada"], step=3)

    assert answer["command"] == "stop"
    assert told.task("ada").progress is None


def test_a_client_is_told_to_stop_when_its_training_is_paused() -> None:
    told = scene()
    move(told.now, TrainingState.PAUSED)

    assert task_progress(task=told.task("ada"), user=told.sites["ada"])["command"] == "stop"


@pytest.mark.parametrize(
    "metrics",
    [
        {"loss": float("nan")},
        {"loss": float("inf")},
        {"lo\x00ss": 1.0},
        {"lo\ud800ss": 1.0},
        {"x" * 70_000: 1.0},
    ],
    ids=["nan", "inf", "nul", "surrogate", "large"],
)
def test_progress_that_no_database_could_hold_is_refused(metrics: dict[str, float]) -> None:
    told = scene()

    with pytest.raises(Invalid) as caught:
        task_progress(task=told.task("ada"), user=told.sites["ada"], metrics=metrics)

    assert caught.value.error_code == "BAD_PROGRESS"
    assert told.task("ada").progress is None


def test_a_failure_leaves_the_client_out_and_the_round_goes_on() -> None:
    told = scene()
    told.send("grace", 1.0)

    task_failure(
        task=told.task("ada"),
        user=told.sites["ada"],
        code="OOM",
        text="too big",
        log_tail="line 1\nline 2",
    )

    task = told.task("ada")
    assert (task.state, task.failure) == (TaskState.FAILED, "OOM: too big\nline 1\nline 2")
    assert told.round.phase == RoundPhase.AGGREGATING


def test_a_long_failure_keeps_its_code_its_beginning_and_the_end_of_its_log() -> None:
    told = scene()

    task_failure(
        task=told.task("ada"),
        user=told.sites["ada"],
        code="OOM",
        text="begin " + "x" * 100_000,
        log_tail="y" * 100_000 + " end",
    )

    failure = told.task("ada").failure
    assert failure.startswith("OOM: begin x")
    assert failure.endswith("y end")
    assert len(failure) <= 4_000


def test_a_failure_said_again_or_too_late_changes_nothing() -> None:
    told = scene()
    told.send("grace", 1.0)
    first = told.task("ada")

    task_failure(task=first, user=told.sites["ada"], code="OOM", text="too big")
    task_failure(task=first, user=told.sites["ada"], code="OTHER", text="again")
    task_failure(task=told.task("grace"), user=told.sites["grace"], code="LATE", text="late")

    assert told.task("ada").failure == "OOM: too big"
    assert told.task("grace").state == TaskState.DONE
    assert told.training.events.count() == 1


def test_somebody_elses_task_does_not_exist() -> None:
    told = scene()

    with pytest.raises(NotFound):
        task_progress(task=told.task("ada"), user=told.sites["grace"])
    with pytest.raises(NotFound):
        task_failure(task=told.task("ada"), user=told.sites["grace"], code="X", text="x")

    assert told.task("ada").state == TaskState.OPEN


def test_an_overdue_task_is_asked_for_until_the_round_is_closed() -> None:
    told = scene("ada")
    now = timezone.now()
    told.training.rounds.update(deadline=now - timedelta(seconds=1))

    answer = ask(told, "ada")

    assert answer["task"]["deadline"] < now.isoformat()


def test_whose_update_is_in_quarantine_or_refused_is_told_so_while_he_waits() -> None:
    told = scene("ada", "grace", "mallory", max_update_norm=10.0)
    told.send("ada", 1.0)
    told.send("mallory", 1_000.0)
    told.work()

    held = task_next(user=told.sites["mallory"])
    update_refuse(update=LocalModel.objects.get(state="quarantined"), user=told.actor)
    refused = task_next(user=told.sites["mallory"])

    assert held["reason"].startswith("your update of round 0 is in quarantine: NORM: ")
    assert "the training's actor or an admin decides. Round 0 waits" in held["reason"]
    assert (held["own_update"]["round"], held["own_update"]["state"]) == (0, "quarantined")
    assert refused["reason"].startswith("your update of round 0 was refused: refused by actor")
    assert refused["own_update"]["state"] == "refused"
    assert "own_update" not in task_next(user=told.sites["ada"])
