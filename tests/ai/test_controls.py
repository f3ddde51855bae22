"""Pause, resume, cancel, retry and extend: legal or refused with the state, harmless when repeated."""

from datetime import timedelta

import numpy as np
import pytest
from django.utils import timezone

from fl_server_ai.services.controls import (
    round_extend,
    training_cancel,
    training_pause,
    training_resume,
    training_retry,
)
from fl_server_ai.services.reconciler import event_give_up, event_lease_drop, sweep
from fl_server_ai.services.tasks import task_failure, task_next, task_progress
from fl_server_ai.services.trainings import training_clients_remove
from fl_server_ai.trainer.events import TrainingRoundFinished
from fl_server_ai.trainer.model_trainer import ModelTrainer
from fl_server_core.exceptions import (
    AggregationException,
    Conflict,
    IllegalMove,
    Invalid,
    NotPermitted,
    RoundClosed,
)
from fl_server_core.lifecycle import EventState, RoundPhase, TaskState, TrainingState
from fl_server_core.models import LocalModel, Notification, Round, TrainerEvent, Training
from fl_server_core.services.events import event_claim
from fl_server_core.services.trainings import training_add_clients, training_delete
from tests.scenes import Scene, scene

pytestmark = pytest.mark.django_db
VERBS = {
    "pause": training_pause,
    "resume": training_resume,
    "cancel": training_cancel,
    "retry": training_retry,
}
# Where each verb works; where the state asked for is so already, it does nothing.
LEGAL = {
    "pause": {"O": "P", "S": "P", "P": "P"},
    "resume": {"P": "O", "O": "O", "S": "S"},
    "cancel": {"I": "X", "O": "X", "S": "X", "P": "X", "X": "X"},
    "retry": {"E": "O", "O": "O", "S": "S"},
}


def steer(running: Scene, verb: str) -> None:
    VERBS[verb](training=running.training, user=running.actor)


def fail(running: Scene, site: str) -> None:
    task_failure(task=running.task(site), user=running.sites[site], code="OOM", text="no memory")


def overdue(running: Scene) -> None:
    Round.objects.filter(pk=running.round.pk).update(deadline=timezone.now() - timedelta(seconds=1))


def brought_to(state: str) -> Scene:
    """A training in this state."""
    if state == "I":
        return scene(started=False)
    if state == "S":
        running = scene(rounds=1, uncertainty="SWAG")
        for site in running.sites:
            running.send(site, 1.0)
        running.work()
        return running
    running = scene(rounds=1, skip_model_tests=True)
    if state == "E":
        for site in running.sites:
            fail(running, site)
    if state == "C":
        for site in running.sites:
            running.send(site, 1.0)
        running.work()
    if state in "PX":
        steer(running, "pause" if state == "P" else "cancel")
    return running


@pytest.mark.parametrize("state", TrainingState.values)
@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_is_legal_or_refused_with_the_state(verb: str, state: str) -> None:
    running = brought_to(state)
    assert running.now.state == state

    if state not in LEGAL[verb]:
        with pytest.raises(IllegalMove) as refusal:
            steer(running, verb)
        assert refusal.value.data == {"state": state}
        assert running.now.state == state
        return
    for _ in range(2):  # asked again, nothing more happens
        steer(running, verb)
        assert running.now.state == LEGAL[verb][state]


@pytest.mark.parametrize("verb", VERBS)
def test_only_the_actor_and_admins_steer(verb: str) -> None:
    running = scene()

    with pytest.raises(NotPermitted):
        VERBS[verb](training=running.training, user=running.sites["ada"])


def test_clients_are_told_to_stop_and_wait_while_it_is_paused() -> None:
    running = scene()
    ada = running.sites["ada"]
    task = running.task("ada")
    assert task_next(user=ada)["state"] == "task"

    steer(running, "pause")

    assert task_progress(task=task, user=ada)["command"] == "stop"
    answer = task_next(user=ada)
    assert (answer["state"], "paused" in answer["reason"]) == ("wait", True)
    steer(running, "resume")
    assert task_next(user=ada)["task"]["id"] == str(task.pk)
    assert task_progress(task=task, user=ada)["command"] is None


def test_a_deadline_does_not_run_while_it_is_paused() -> None:
    running = scene(round_deadline=100.0)

    steer(running, "pause")
    held = running.round
    assert held.deadline is None
    assert held.remaining == pytest.approx(100, abs=20)
    Round.objects.update(remaining=33.0)
    sweep()
    steer(running, "resume")

    left = (running.round.deadline - timezone.now()).total_seconds()
    assert left == pytest.approx(33, abs=10)
    assert running.round.remaining is None


def test_updates_that_arrive_during_a_pause_count_when_it_ends() -> None:
    running = scene(skip_model_tests=True)
    running.send("ada", 1.0)
    steer(running, "pause")

    running.send("grace", 3.0)
    sweep()
    assert (running.round.phase, TrainerEvent.objects.count()) == (RoundPhase.COLLECTING, 0)
    steer(running, "resume")
    running.work()

    assert running.now.model.round == 1
    np.testing.assert_allclose(running.current()["layer.bias"], 2.0)


def test_a_failure_or_a_removal_during_a_pause_counts_when_it_ends() -> None:
    running = scene("ada", "grace", "joan", skip_model_tests=True)
    running.send("ada", 1.0)
    steer(running, "pause")

    fail(running, "grace")
    training_clients_remove(
        training=running.training, user=running.actor, clients=[running.sites["joan"].pk]
    )
    assert running.round.phase == RoundPhase.COLLECTING
    steer(running, "resume")

    assert running.round.phase == RoundPhase.AGGREGATING


def test_work_that_has_not_begun_waits_for_the_resume() -> None:
    running = scene(skip_model_tests=True)
    running.send("ada", 1.0)
    running.send("grace", 3.0)
    steer(running, "pause")

    assert sweep().dispatched == 0
    running.work()  # a hint that was still on its way
    assert running.now.model.round == 0
    steer(running, "resume")
    running.work()

    assert (running.now.model.round, running.round.number) == (1, 1)
    assert TrainerEvent.objects.get().failures == 0


def test_work_in_flight_publishes_and_what_follows_waits_for_the_resume(monkeypatch) -> None:
    running = scene(skip_model_tests=True)
    running.send("ada", 1.0)
    running.send("grace", 3.0)
    handle = TrainingRoundFinished.handle

    def paused_meanwhile(event: TrainingRoundFinished) -> None:
        steer(running, "pause")
        handle(event)

    monkeypatch.setattr(TrainingRoundFinished, "handle", paused_meanwhile)
    running.work()
    monkeypatch.undo()

    assert (running.now.state, running.now.model.round) == ("P", 1)
    assert Round.objects.count() == 1
    steer(running, "resume")
    running.work()
    assert (running.now.state, running.round.number) == ("O", 1)
    assert running.now.model.weights.num_updates == 2


def test_work_that_fails_during_a_pause_ends_the_training(monkeypatch) -> None:
    running = scene()
    running.send("ada", 1.0)
    running.send("grace", 3.0)

    def broken(event: TrainingRoundFinished) -> None:
        steer(running, "pause")
        raise AggregationException("these do not fit")

    monkeypatch.setattr(TrainingRoundFinished, "handle", broken)
    running.work()

    assert (running.now.state, running.now.reason[:18]) == ("E", "AGGREGATION_FAILED")


@pytest.mark.parametrize("phase", [RoundPhase.SWAG, RoundPhase.TESTING])
def test_swag_rounds_and_tests_pause_and_go_on(phase: RoundPhase) -> None:
    running = scene(rounds=1, uncertainty="SWAG" if phase == RoundPhase.SWAG else "NONE")
    running.send("ada", 1.0)
    running.send("grace", 3.0)
    running.work()
    assert running.round.phase == phase
    before = running.now.state

    steer(running, "pause")
    if phase == RoundPhase.TESTING:
        running.report("ada", {"loss": 1.0})
        running.report("grace", {"loss": 3.0})
    assert running.round.phase == phase
    steer(running, "resume")

    assert running.now.state == before
    if phase == RoundPhase.TESTING:
        running.work()
        assert running.now.state == TrainingState.COMPLETED


def test_a_cancelled_training_publishes_nothing_more(monkeypatch) -> None:
    running = scene()
    running.send("ada", 1.0)
    running.send("grace", 3.0)
    handle = TrainingRoundFinished.handle

    def cancelled_meanwhile(event: TrainingRoundFinished) -> None:
        steer(running, "cancel")
        handle(event)

    monkeypatch.setattr(TrainingRoundFinished, "handle", cancelled_meanwhile)
    running.work()

    assert (running.now.state, running.now.model.round) == ("X", 0)
    assert running.now.model.weights.number == 0
    assert TrainerEvent.objects.get().state == EventState.FAILED
    assert running.round.phase == RoundPhase.FAILED


def test_a_cancelled_training_has_nothing_left_to_do_and_says_so() -> None:
    running = scene()
    task = running.task("ada")

    steer(running, "cancel")

    assert not running.round.tasks.filter(state=TaskState.OPEN).exists()
    assert task_progress(task=task, user=running.sites["ada"])["command"] == "stop"
    answer = task_next(user=running.sites["ada"])
    assert (answer["state"], answer["training_state"]) == ("done", "X")
    with pytest.raises(RoundClosed):
        running.send("ada", 1.0)


def test_a_retry_keeps_what_was_accepted_and_asks_the_others_again() -> None:
    running = scene("ada", "grace", "joan", min_updates=3, skip_model_tests=True)
    running.send("ada", 1.0, samples=1)
    fail(running, "grace")
    overdue(running)
    sweep()
    assert running.now.reason.startswith("NOT_ENOUGH_UPDATES")

    steer(running, "retry")

    assert (running.now.state, running.now.reason, running.now.finished_at) == ("O", "", None)
    assert running.round.phase == RoundPhase.COLLECTING
    assert running.round.deadline > timezone.now()
    assert running.task("ada").state == TaskState.DONE
    assert task_next(user=running.sites["grace"])["state"] == "task"
    running.send("grace", 2.0, samples=1)
    running.send("joan", 6.0, samples=1)
    running.work()
    np.testing.assert_allclose(running.current()["layer.bias"], 3.0)
    assert LocalModel.objects.filter(state="consumed").count() == 3


def test_a_retry_does_work_again_that_was_given_up(settings) -> None:
    settings.FL_EVENT_ATTEMPTS = 1
    running = scene(skip_model_tests=True)
    running.send("ada", 1.0)
    running.send("grace", 3.0)
    event = TrainerEvent.objects.get()
    event_claim(event_id=event.pk)  # by a worker that dies
    event_lease_drop(event_id=event.pk)
    sweep()
    assert running.now.reason.startswith("WORKER_LOST")

    steer(running, "retry")
    running.work()

    assert (running.now.state, running.now.model.round, running.round.number) == ("O", 1, 1)
    assert running.now.model.weights.num_updates == 2


def test_the_worker_of_before_the_retry_publishes_nothing() -> None:
    running = scene()
    running.send("ada", 1.0)
    running.send("grace", 3.0)
    old = event_claim(event_id=TrainerEvent.objects.get().pk)
    event_give_up(event=old, reason="WORKER_LOST: for the test")
    steer(running, "retry")
    new = event_claim(event_id=old.pk)

    assert new.attempt == old.attempt + 1
    trainer = ModelTrainer(old.training, work=old)
    trainer.handle(TrainingRoundFinished(trainer))
    assert running.now.model.round == 0
    assert TrainerEvent.objects.get().state == EventState.RUNNING


def test_a_swag_round_that_got_too_few_moments_is_retried() -> None:
    running = brought_to("S")
    overdue(running)
    sweep()
    assert running.now.reason.startswith("NOT_ENOUGH_MOMENTS")

    steer(running, "retry")

    assert (running.now.state, running.round.phase) == ("S", RoundPhase.SWAG)
    assert task_next(user=running.sites["ada"])["task"]["kind"] == "swag"


def test_a_retry_that_would_fail_at_once_is_refused_until_somebody_is_back() -> None:
    running = brought_to("E")
    gone = [site.pk for site in running.sites.values()]
    training_clients_remove(training=running.training, user=running.actor, clients=gone)

    with pytest.raises(Conflict) as refusal:
        steer(running, "retry")
    assert (refusal.value.error_code, running.now.state) == ("STILL_FAILING", "E")

    training_add_clients(training=running.training, user=running.actor, clients=gone[:1])
    steer(running, "retry")
    assert task_next(user=running.sites["ada"])["state"] == "task"
    assert running.round.tasks.filter(state=TaskState.OPEN).count() == 1


def test_a_retry_tells_webhooks_again() -> None:
    running = scene(endpoint="http://127.0.0.1:9/hook")
    messages = Notification.objects.filter(type="UPDATE_ROUND_START")
    messages.update(state="rejected")
    for site in running.sites:
        fail(running, site)

    steer(running, "retry")

    again = messages.filter(state="queued")
    assert set(again.values_list("receiver__username", "asked")) == {("ada", 2), ("grace", 2)}


def test_more_time_is_given_from_now_and_never_less() -> None:
    running = scene(round_deadline=100.0)

    for _ in range(2):
        round_extend(training=running.training, user=running.actor, seconds=500.0)

    left = (running.round.deadline - timezone.now()).total_seconds()
    assert left == pytest.approx(500, abs=20)
    with pytest.raises(Invalid) as refusal:
        round_extend(training=running.training, user=running.actor, seconds=5.0)
    assert refusal.value.error_code == "NOT_LATER"


def test_more_time_during_a_pause_is_there_after_it() -> None:
    running = scene(round_deadline=100.0)
    steer(running, "pause")

    round_extend(training=running.training, user=running.actor, seconds=500.0)
    steer(running, "resume")

    left = (running.round.deadline - timezone.now()).total_seconds()
    assert left == pytest.approx(500, abs=20)


def test_there_is_nothing_to_extend_while_a_worker_is_waited_for() -> None:
    running = scene()
    running.send("ada", 1.0)
    running.send("grace", 3.0)

    with pytest.raises(Conflict) as refusal:
        round_extend(training=running.training, user=running.actor, seconds=9e5)

    assert refusal.value.error_code == "NO_DEADLINE"


@pytest.mark.parametrize("state", ["I", "C", "X", "E"])
def test_an_extension_of_what_does_not_run_is_refused_with_the_state(state: str) -> None:
    running = brought_to(state)

    with pytest.raises(IllegalMove) as refusal:
        round_extend(training=running.training, user=running.actor, seconds=5.0)

    assert refusal.value.data == {"state": state}


def test_a_cancelled_training_can_be_deleted() -> None:
    running = brought_to("X")
    training_delete(training=running.training, user=running.actor)

    assert not Training.objects.exists()
