"""Failure policies: who fails is dropped, waited for, or ends the training."""

from datetime import timedelta

import pytest
from django.utils import timezone

from fl_server_ai.notifications.wakeups import changed_since
from fl_server_ai.services.reconciler import sweep
from fl_server_ai.services.tasks import task_failure, task_next
from fl_server_ai.services.trainings import training_clients_remove
from fl_server_core.exceptions import Invalid
from fl_server_core.lifecycle import RoundPhase, TaskState
from fl_server_core.models import Notification, Round, Task
from fl_server_core.services.round_policy import RoundPolicy, Standing, Step, decide
from tests.scenes import Scene, scene

pytestmark = pytest.mark.django_db


def fail(running: Scene, site: str) -> None:
    task = running.task(site)
    task_failure(task=task, user=running.sites[site], code="TRAIN_EXCEPTION", text="KeyError")


def overdue(running: Scene) -> None:
    Round.objects.filter(pk=running.round.pk).update(deadline=timezone.now() - timedelta(seconds=1))


def pause_ends(running: Scene, site: str) -> None:
    task = running.task(site)
    Task.objects.filter(pk=task.pk).update(not_before=timezone.now())


def test_by_default_a_round_goes_on_without_who_failed() -> None:
    running = scene()
    running.send("ada", 1.0)

    fail(running, "grace")

    assert running.round.phase == RoundPhase.AGGREGATING
    assert running.task("grace").state == TaskState.FAILED


def test_wait_asks_the_one_who_failed_again_after_a_pause() -> None:
    running = scene(failure_policy="wait")
    running.send("ada", 1.0)

    fail(running, "grace")

    task = running.task("grace")
    assert (task.state, task.attempt) == (TaskState.OPEN, 2)
    assert task.failure == "TRAIN_EXCEPTION: KeyError"
    assert running.round.phase in {RoundPhase.NOTIFYING, RoundPhase.COLLECTING}
    assert task_next(user=running.sites["grace"])["state"] == "wait"
    pause_ends(running, "grace")
    assert task_next(user=running.sites["grace"])["task"]["id"] == str(task.pk)
    changes = changed_since(timezone.now() - timedelta(seconds=5))
    assert running.sites["grace"].pk in {change.user_id for change in changes}


def test_wait_goes_on_when_the_last_one_has_delivered_after_all() -> None:
    running = scene(failure_policy="wait", skip_model_tests=True)
    running.send("ada", 1.0)
    for _ in range(5):
        fail(running, "grace")

    running.send("grace", 3.0)
    running.work()

    assert running.now.model.round == 1
    assert running.current()["layer.bias"].tolist() == [2.0] * 3
    assert Task.objects.get(round__number=0, user=running.sites["grace"]).attempt == 6


def test_wait_asks_the_late_again_at_the_deadline_and_moves_it() -> None:
    running = scene(failure_policy="wait", round_deadline=60.0)
    running.send("ada", 1.0)
    overdue(running)

    sweep()
    sweep()

    task, now = running.task("grace"), timezone.now()
    assert (task.state, task.attempt) == (TaskState.OPEN, 2)
    assert task.failure.startswith("DEADLINE")
    assert task_next(user=running.sites["grace"])["state"] == "task"
    assert running.round.deadline is not None
    assert timedelta(seconds=50) < running.round.deadline - now < timedelta(seconds=61)
    assert running.now.state == "O"


def test_wait_does_not_wait_for_who_failed_and_was_taken_out() -> None:
    running = scene(failure_policy="wait")
    running.send("ada", 1.0)
    fail(running, "grace")

    training_clients_remove(
        training=running.training, user=running.actor, clients=[running.sites["grace"].pk]
    )

    assert running.task("grace").state == TaskState.CANCELLED
    assert running.round.phase == RoundPhase.AGGREGATING


def test_wait_sends_a_webhook_for_each_attempt_but_not_two_at_a_time() -> None:
    running = scene(failure_policy="wait", endpoint="https://site.example/hook")
    asked = Notification.objects.filter(
        receiver=running.sites["grace"], type="UPDATE_ROUND_START"
    ).order_by("asked")

    fail(running, "grace")
    assert list(asked.values_list("asked", flat=True)) == [1]
    asked.update(state="delivered")
    fail(running, "grace")

    assert list(asked.values_list("asked", "state")) == [(1, "delivered"), (3, "queued")]
    assert asked.last().next_attempt_at == running.task("grace").not_before


def test_a_test_round_goes_on_without_who_cannot_test() -> None:
    running = scene(failure_policy="wait", rounds=1)
    running.send("ada", 1.0)
    running.send("grace", 1.0)
    running.work()
    running.report("ada", {"loss": 0.5})

    task = running.task("grace", "evaluate")
    task_failure(task=task, user=running.sites["grace"], code="EVALUATE_NOT_IMPLEMENTED", text="")
    running.work()

    assert running.now.state == "C"


def test_fail_ends_the_training_with_the_first_failure() -> None:
    running = scene(failure_policy="fail")

    fail(running, "grace")

    assert running.now.state == "E"
    assert running.now.reason.startswith("TOO_MANY_FAILURES: 1 of 2 sites failed")
    assert running.task("ada").state == TaskState.CANCELLED


@pytest.mark.parametrize("policy", ["drop", "fail"])
def test_a_failure_rate_is_borne_up_to_its_limit(policy: str) -> None:
    running = scene("a", "b", "c", "d", failure_policy=policy, max_failure_rate=0.25)

    fail(running, "a")
    assert running.now.state == "O"
    fail(running, "b")

    assert running.now.state == "E"


def test_who_is_late_counts_as_failed_at_the_deadline() -> None:
    running = scene("a", "b", "c", max_failure_rate=0.5)
    running.send("a", 1.0)
    overdue(running)

    sweep()

    assert running.now.reason.startswith("TOO_MANY_FAILURES: 2 of 3")
    assert running.task("b").state == TaskState.EXPIRED


def test_a_failure_rate_means_nothing_where_failures_are_waited_for() -> None:
    with pytest.raises(Invalid) as refusal:
        scene(failure_policy="wait", max_failure_rate=0.5)

    assert refusal.value.data["errors"][0]["pointer"] == "/options/max_failure_rate"


def test_the_policy_of_a_round_is_stored_with_it() -> None:
    running = scene(failure_policy="wait", min_updates=2)

    assert running.round.policy["failure_policy"] == "wait"
    assert running.round.policy["min_updates"] == 2


def test_with_nobody_left_to_ask_a_waiting_round_fails() -> None:
    step, _ = decide(RoundPolicy(failure_policy="wait"), Standing(0, 0, 0, overdue=False))

    assert step == Step.FAIL


def test_a_training_that_ends_for_want_of_updates_says_with_which_codes_sites_failed() -> None:
    running = scene(min_updates=2, skip_model_tests=True)

    for site in ("ada", "grace"):
        task = running.task(site)
        task_failure(task=task, user=running.sites[site], code="EXTRA_MISSING", text="no dc")

    assert running.now.reason.endswith("2 are needed (failed: 2 x EXTRA_MISSING)")
