"""What a worker does with an event, and what a second one, a late one or a killed one does not."""

import itertools
from datetime import timedelta

import numpy as np
import pytest
from django.utils import timezone

from fl_server_ai.services.reconciler import sweep
from fl_server_ai.services.training_options import TrainerOptions
from fl_server_ai.services.trainings import training_create, training_start
from fl_server_ai.trainer import publishing, working
from fl_server_ai.trainer.events import ModelTestFinished, TrainingRoundFinished
from fl_server_ai.trainer.events.training_round_finished import follow_up
from fl_server_ai.trainer.model_trainer import ModelTrainer
from fl_server_ai.trainer.tasks import process_trainer_task
from fl_server_core.exceptions import AggregationException, Invalid, RoundClosed
from fl_server_core.lifecycle import RoundPhase
from fl_server_core.models import Blob, LocalModel, Metric, Notification, Round, TrainerEvent
from fl_server_core.services.events import event_claim
from tests.scenes import Scene, scene

pytestmark = pytest.mark.django_db
HOOK = "https://site.example/hook"


def complete(running: Scene, ada: float = 1.0, grace: float = 3.0) -> TrainerEvent:
    running.send("ada", ada, samples=1)
    running.send("grace", grace, samples=3)
    return TrainerEvent.objects.get(round=running.round, type="TrainingRoundFinished")


def expire(event: TrainerEvent) -> None:
    past = timezone.now() - timedelta(seconds=1)
    TrainerEvent.objects.filter(pk=event.pk).update(lease_until=past)


@pytest.mark.parametrize(
    ("skip", "each", "round"), list(itertools.product([True, False], [True, False], [1, 2, 3]))
)
def test_what_follows_an_aggregation(skip: bool, each: bool, round: int) -> None:
    options = TrainerOptions(skip_model_tests=skip, model_test_after_each_round=each)

    step = follow_up(options, round=round, target=2)

    if skip:
        assert step == ("finish" if round >= 2 else "start_round")
    elif each or round >= 2:
        assert step == "test_round"
    else:
        assert step == "start_round"


@pytest.mark.parametrize(("skip", "each"), list(itertools.product([True, False], [True, False])))
def test_a_training_of_two_rounds_runs_to_its_end(skip: bool, each: bool) -> None:
    running = scene(
        endpoint=HOOK, skip_model_tests=skip, model_test_after_each_round=each, rounds=2
    )
    for _ in range(2):
        complete(running)
        running.work()
        if running.round.phase == RoundPhase.TESTING:
            running.report("ada", {"accuracy": 0.5})
            running.report("grace", {"accuracy": 1.0})
            running.work()

    assert running.now.state == "C"
    assert running.now.model.round == 2
    assert [v.number for v in running.now.model.versions.order_by("number")] == [0, 1, 2]
    sent = [
        (n.type, n.body.get("round"))
        for n in Notification.objects.filter(receiver=running.sites["ada"]).order_by("id")
    ]
    tests = {1: not skip and each, 2: not skip}
    expected = [("TRAINING_START", None), ("UPDATE_ROUND_START", 0)]
    expected += [("MODEL_TEST_ROUND", 1)] * tests[1] + [("UPDATE_ROUND_START", 1)]
    expected += [("MODEL_TEST_ROUND", 2)] * tests[2] + [("TRAINING_FINISHED", None)]
    assert sent == expected


def test_the_mean_is_weighted_by_samples() -> None:
    running = scene(skip_model_tests=True)

    complete(running, ada=1.0, grace=3.0)
    running.work()

    assert running.current()["layer.bias"].tolist() == [2.5, 2.5, 2.5]
    assert running.current()["layer.weight"].dtype == np.float32


def test_a_repeated_message_changes_nothing() -> None:
    running = scene(skip_model_tests=True, rounds=3)
    event = complete(running)

    process_trainer_task(event.pk)
    before = running.digest()
    process_trainer_task(event.pk)

    assert running.now.model.round == 1
    assert running.digest() == before
    assert Round.objects.count() == 2


def test_handle_on_an_incomplete_round_changes_nothing_and_counts_as_no_failure() -> None:
    running = scene()
    running.send("ada", 1.0)
    event = TrainerEvent.objects.create(
        training=running.training, round=running.round, type="TrainingRoundFinished"
    )

    ModelTrainer(running.now).handle(TrainingRoundFinished)
    process_trainer_task(event.pk)

    event.refresh_from_db()
    assert (event.failures, event.state) == (0, "pending")
    assert running.now.model.round == 0
    assert running.round.phase == RoundPhase.COLLECTING


def test_a_worker_killed_in_the_middle_costs_an_attempt_and_nothing_else() -> None:
    undisturbed = scene(skip_model_tests=True)
    event = complete(undisturbed)
    assert event_claim(event_id=event.pk) is not None  # killed here: claimed, and never heard of

    sweep()
    process_trainer_task(event.pk)
    assert undisturbed.now.model.round == 0  # the dead one's lease still runs
    expire(event)
    process_trainer_task(event.pk)

    event.refresh_from_db()
    assert (event.attempt, event.state) == (2, "done")
    assert undisturbed.current()["layer.bias"].tolist() == [2.5] * 3


def test_a_kill_between_publishing_and_what_follows_goes_on_from_there() -> None:
    running = scene(skip_model_tests=True, rounds=2)
    event = complete(running)
    work = event_claim(event_id=event.pk)
    trainer = ModelTrainer(running.now, work=work)
    TrainingRoundFinished(trainer).handle()  # killed here: published, nothing follows yet
    digest = running.digest()
    expire(event)

    process_trainer_task(event.pk)

    assert running.digest() == digest
    assert running.now.model.versions.count() == 2
    assert running.round.number == 1


def test_a_slow_worker_that_lost_its_lease_publishes_nothing() -> None:
    running = scene(skip_model_tests=True, rounds=3)
    event = complete(running)
    slow = event_claim(event_id=event.pk)
    expire(event)
    process_trainer_task(event.pk)
    after = running.digest(), Round.objects.count(), running.now.last_update

    ModelTrainer(running.now, work=slow).handle(TrainingRoundFinished)

    assert (running.digest(), Round.objects.count(), running.now.last_update) == after


def test_a_reason_that_will_not_go_away_ends_the_training_at_once(monkeypatch) -> None:
    def refuse(**_):
        raise AggregationException("parameter sets differ: layer.bias")

    monkeypatch.setattr(publishing, "aggregate", refuse)
    running = scene()
    event = complete(running)

    process_trainer_task(event.pk)

    event.refresh_from_db()
    assert (event.state, running.now.state) == ("failed", "E")
    assert "parameter sets differ: layer.bias" in running.now.reason
    assert running.round.phase == RoundPhase.FAILED


def test_three_lost_workers_end_the_training_with_that_reason() -> None:
    running = scene()
    event = complete(running)
    for _ in range(3):
        assert event_claim(event_id=event.pk) is not None
        expire(event)

    sweep()

    assert running.now.state == "E"
    assert running.now.reason.startswith("WORKER_LOST: TrainingRoundFinished, 3 attempts")


def test_an_accident_is_tried_again_later(monkeypatch) -> None:
    calls = []

    def fail_once(**arguments):
        calls.append(1)
        if len(calls) == 1:
            raise OSError("disk went away")
        return real(**arguments)

    real = publishing.aggregate
    monkeypatch.setattr(publishing, "aggregate", fail_once)
    running = scene(skip_model_tests=True)
    event = complete(running)

    process_trainer_task(event.pk)
    event.refresh_from_db()
    assert (event.state, event.error) == ("pending", "OSError: disk went away")
    process_trainer_task(event.pk)  # too early
    assert running.now.model.round == 0
    expire(event)
    process_trainer_task(event.pk)

    assert running.now.model.round == 1


@pytest.mark.parametrize("delete", [True, False])
def test_files_of_updates_go_by_option_and_their_rows_stay(delete: bool) -> None:
    running = scene(skip_model_tests=True, delete_local_models_after_aggregation=delete)

    complete(running)
    running.work()

    assert LocalModel.objects.filter(state="consumed").count() == 2
    assert LocalModel.objects.filter(blob=None).count() == (2 if delete else 0)
    assert Blob.objects.count() == (2 if delete else 4)


def test_a_kill_between_publishing_and_deleting_leaves_the_files_to_the_sweep(monkeypatch) -> None:
    monkeypatch.setattr(working, "blobs_delete_doomed", lambda: None)  # killed before it
    running = scene(skip_model_tests=True)
    complete(running)
    running.work()
    assert Blob.objects.count() == 4

    sweep()

    assert Blob.objects.count() == 2
    assert running.current()


def test_test_metrics_are_averaged_by_samples_over_those_who_sent_them() -> None:
    running = scene(rounds=1)
    complete(running)
    running.work()

    running.report("ada", {"accuracy": 0.0, "only ada": 7.0}, samples=30)
    running.report("grace", {"accuracy": 1.0}, samples=10)
    running.work()

    means = {m.key: (m.value_float, m.step) for m in Metric.objects.filter(reporter=None)}
    assert means == {"accuracy": (0.25, 1), "only ada": (7.0, 1)}
    assert running.now.state == "C"


def test_without_a_sample_size_that_of_the_testers_update_counts() -> None:
    running = scene(rounds=1)
    complete(running)  # ada 1, grace 3
    running.work()

    running.report("ada", {"accuracy": 0.0})
    running.report("grace", {"accuracy": 1.0})
    running.work()

    assert Metric.objects.get(reporter=None).value_float == 0.75


def test_metrics_sent_twice_count_once_and_after_the_mean_stands_only_the_same_pass() -> None:
    running = scene(rounds=1)
    complete(running)
    running.work()
    running.report("ada", {"accuracy": 0.1})
    running.report("ada", {"accuracy": 0.5})
    assert running.round.phase == RoundPhase.TESTING
    running.report("grace", {"accuracy": 0.5})
    running.work()

    running.report("ada", {"accuracy": 0.5})
    with pytest.raises(RoundClosed):
        running.report("ada", {"accuracy": 0.9})

    assert Metric.objects.get(reporter=None).value_float == 0.5
    assert TrainerEvent.objects.filter(type="ModelTestFinished").count() == 1


def test_a_test_round_without_an_answer_ends_at_its_deadline() -> None:
    running = scene(rounds=1)
    complete(running)
    running.work()
    Round.objects.update(deadline=timezone.now() - timedelta(seconds=1))

    sweep()
    running.work()

    assert running.now.state == "C"


def test_handling_a_test_event_early_changes_nothing() -> None:
    running = scene()

    ModelTrainer(running.now).handle(ModelTestFinished)

    assert running.round.phase == RoundPhase.COLLECTING
    assert not Metric.objects.exists()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"method": "FedDC"}, Invalid),
        ({"method": "NoSuch"}, Invalid),
        ({"uncertainty_options": {"N": 0}}, Invalid),
        ({"uncertainty": "ENSEMBLE", "uncertainty_options": {"weighting": "x"}}, Invalid),
        ({"tpyo": 1}, Invalid),
        ({"skip_model_tests": "yes"}, Invalid),
        ({"min_updates": 0}, Invalid),
        ({"round_deadline": -1}, Invalid),
        ({"client_config": [1]}, Invalid),
        ({"mu": 0.1}, Invalid),  # FedAvg has no mu
        ({"method": "FedProx", "mu": -1.0}, Invalid),
    ],
    ids=str,
)
def test_what_would_not_be_done_exactly_as_asked_is_refused(arguments, error) -> None:
    with pytest.raises(error):
        scene(started=False, **arguments)


def test_mu_reaches_the_clients() -> None:
    from fl_server_ai.services.training_options import client_config

    running = scene(method="FedProx", mu=1, client_config={"epochs": 2})

    assert client_config(running.training) == {"mu": 1, "epochs": 2}


def test_the_next_training_runs_after_one_that_lost_its_workers() -> None:
    running = scene(rounds=1, skip_model_tests=True)
    event = complete(running)
    for _ in range(3):
        event_claim(event_id=event.pk)
        expire(event)
    following = training_create(
        actor=running.actor,
        model=running.model,
        target_num_updates=1,
        aggregation_method="FedAvg",
        options={"skip_model_tests": True},
        clients=[site.pk for site in running.sites.values()],
    )
    sweep()
    assert running.now.state == "E"

    training_start(training=following, user=running.actor)
    another = Scene(running.actor, running.sites, following.model, following)
    complete(another)
    another.work()

    assert another.now.state == "C"
