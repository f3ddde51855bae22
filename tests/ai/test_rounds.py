"""When a round goes on, and what is refused: asked through the services that the API calls."""

from datetime import timedelta

import numpy as np
import pytest
from django.utils import timezone

from fl_server_ai.services.reconciler import sweep
from fl_server_ai.services.tasks import task_failure
from fl_server_ai.services.trainings import training_clients_remove, training_start
from fl_server_ai.services.updates import update_submit
from fl_server_core.exceptions import (
    Conflict,
    DuplicateUpdate,
    IllegalMove,
    KeyMismatch,
    NonFinite,
    NotFound,
    NotPermitted,
    RoundClosed,
    ShapeMismatch,
    Unusable,
)
from fl_server_core.lifecycle import RoundPhase
from fl_server_core.models import Blob, LocalModel, Metric, Round, TrainerEvent
from fl_server_core.services.trainings import training_add_clients
from tests.scenes import Scene, person, scene, staged, weights

pytestmark = pytest.mark.django_db


def remove(running: Scene, site: str) -> None:
    training_clients_remove(
        training=running.training, user=running.actor, clients=[running.sites[site].pk]
    )


def overdue(running: Scene) -> None:
    Round.objects.filter(pk=running.round.pk).update(deadline=timezone.now() - timedelta(seconds=1))


def test_the_last_update_closes_the_round_with_one_event() -> None:
    running = scene()

    running.send("ada", 1.0)
    assert running.round.phase == RoundPhase.COLLECTING
    running.send("grace", 3.0)

    assert running.round.phase == RoundPhase.AGGREGATING
    assert TrainerEvent.objects.get().type == "TrainingRoundFinished"


def test_a_receipt_says_how_many_are_in() -> None:
    running = scene()

    first, second = running.send("ada", 1.0), running.send("grace", 1.0)

    assert (first.received, first.needed, first.created) == (1, 2, True)
    assert (second.received, second.needed) == (2, 2)


def test_the_same_update_again_is_fine_even_when_the_round_has_moved_on() -> None:
    running = scene(skip_model_tests=True)
    before = running.send("ada", 1.0)
    running.send("grace", 1.0)
    running.work()
    assert running.now.model.round == 1

    again = running.send("ada", 1.0, round=0)

    assert (again.created, again.update.pk) == (False, before.update.pk)
    assert LocalModel.objects.count() == 2


def test_other_bytes_from_the_same_site_are_a_duplicate() -> None:
    running = scene()
    running.send("ada", 1.0)

    with pytest.raises(DuplicateUpdate):
        running.send("ada", 2.0)
    with pytest.raises(DuplicateUpdate):
        running.send("ada", 1.0, samples=2)

    assert LocalModel.objects.count() == 1


@pytest.mark.parametrize("round", [1, 7])
def test_an_update_for_another_round_is_refused_with_the_round_it_is_at(round: int) -> None:
    running = scene()

    with pytest.raises(RoundClosed) as refusal:
        running.send("ada", 1.0, round=round)

    assert refusal.value.data["round"] == 0


def test_a_training_that_is_not_running_takes_no_updates() -> None:
    waiting = scene(started=False)

    with pytest.raises(RoundClosed) as refusal:
        waiting.send("ada", 1.0)

    assert refusal.value.error_code == "TRAINING_NOT_RUNNING"
    assert refusal.value.data["state"] == "I"


def test_an_outsider_does_not_even_learn_that_the_model_exists() -> None:
    running = scene()
    running.sites["eve"] = person("eve", client=True)

    with pytest.raises(NotFound):
        running.send("eve", 1.0)


def test_the_actor_is_no_participant() -> None:
    running = scene()
    running.sites["actor"] = running.actor

    with pytest.raises(NotPermitted) as refusal:
        running.send("actor", 1.0)

    assert refusal.value.error_code == "NOT_PARTICIPANT"


BAD = {
    "missing tensor": (lambda w: w.pop("steps"), KeyMismatch),
    "extra tensor": (lambda w: w.update(more=np.zeros(1, np.float32)), KeyMismatch),
    "broadcastable shape": (
        lambda w: w.update({"layer.bias": np.zeros(1, np.float32)}),
        ShapeMismatch,
    ),
    "NaN": (lambda w: w["layer.weight"].__setitem__((0, 0), np.nan), NonFinite),
    "infinity": (lambda w: w["layer.bias"].__setitem__(2, np.inf), NonFinite),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_update_leaves_nothing_behind(what: str) -> None:
    from safetensors.numpy import save

    running = scene()
    change, error = BAD[what]
    tensors = weights(1.0)
    change(tensors)
    file = staged(save(tensors))

    with pytest.raises(error):
        update_submit(
            model_id=running.training.model_id,
            owner=running.sites["ada"],
            round=0,
            sample_size=1,
            file=file,
            sha256=None,
            metrics={},
        )

    assert not file.exists()
    assert not LocalModel.objects.exists()
    assert Blob.objects.count() == 1
    assert running.task("ada").state == "open"


@pytest.mark.parametrize("samples", [0, -1, 2**31 + 1])
def test_a_sample_size_is_positive_and_bounded(samples: int) -> None:
    with pytest.raises(Unusable) as refusal:
        scene().send("ada", 1.0, samples=samples)

    assert refusal.value.error_code == "SAMPLE_SIZE"


def test_removing_the_one_who_is_missing_completes_the_round() -> None:
    running = scene()
    running.send("ada", 1.0)

    remove(running, "grace")

    assert running.round.phase == RoundPhase.AGGREGATING
    assert TrainerEvent.objects.count() == 1
    assert running.task("grace").state == "cancelled"


def test_a_failure_of_the_one_who_is_missing_completes_the_round() -> None:
    running = scene()
    running.send("ada", 1.0)

    task_failure(
        task=running.task("grace"), user=running.sites["grace"], code="OOM", text="", log_tail=""
    )

    assert running.round.phase == RoundPhase.AGGREGATING


def test_the_deadline_closes_the_round_with_those_who_are_in() -> None:
    running = scene(skip_model_tests=True)
    running.send("ada", 5.0)
    overdue(running)

    sweep()
    running.work()

    assert running.now.model.round == 1
    assert running.current()["layer.bias"].tolist() == [5.0] * 3
    with pytest.raises(RoundClosed):
        running.send("grace", 1.0, round=0)


def test_a_deadline_with_too_few_updates_ends_in_error_with_a_reason() -> None:
    running = scene(min_updates=2)
    running.send("ada", 5.0)
    overdue(running)

    sweep()

    assert running.now.state == "E"
    assert running.now.reason.startswith("NOT_ENOUGH_UPDATES")
    assert running.round.phase == RoundPhase.FAILED


def test_when_everybody_has_left_the_training_does_not_hang() -> None:
    running = scene()

    remove(running, "ada")
    remove(running, "grace")

    assert running.now.state == "E"


def test_who_joins_in_the_middle_takes_part_from_the_next_round_on() -> None:
    running = scene(skip_model_tests=True, rounds=3)
    running.sites["joan"] = person("joan", client=True)
    training_add_clients(
        training=running.training, user=running.actor, clients=[running.sites["joan"].pk]
    )

    with pytest.raises(RoundClosed) as refusal:
        running.send("joan", 1.0)
    assert refusal.value.error_code == "NOT_SELECTED"
    running.send("ada", 1.0)
    running.send("grace", 1.0)
    running.work()

    assert running.round.tasks.count() == 3


def test_who_was_removed_is_not_asked_again_until_readmitted() -> None:
    running = scene(skip_model_tests=True, rounds=3)
    remove(running, "grace")
    running.send("ada", 1.0)
    running.work()
    assert running.round.tasks.count() == 1

    training_add_clients(
        training=running.training, user=running.actor, clients=[running.sites["grace"].pk]
    )
    running.send("ada", 1.0)
    running.work()

    assert running.round.tasks.count() == 2


def test_starting_twice_is_refused_and_starts_once() -> None:
    running = scene()

    with pytest.raises(IllegalMove):
        training_start(training=running.training, user=running.actor)

    assert Round.objects.count() == 1


def test_starting_without_clients_is_refused() -> None:
    waiting = scene(started=False)
    remove(waiting, "ada")
    remove(waiting, "grace")

    with pytest.raises(Conflict) as refusal:
        training_start(training=waiting.training, user=waiting.actor)

    assert refusal.value.error_code == "NO_PARTICIPANTS"
    assert waiting.now.state == "I"


def test_only_the_actor_starts() -> None:
    waiting = scene(started=False)

    with pytest.raises(NotPermitted):
        training_start(training=waiting.training, user=waiting.sites["ada"])


def test_metrics_that_come_with_an_update_are_the_updates_own() -> None:
    from safetensors.numpy import save

    running = scene()
    receipt = update_submit(
        model_id=running.training.model_id,
        owner=running.sites["ada"],
        round=0,
        sample_size=9,
        file=staged(save(weights(1.0))),
        sha256=None,
        metrics={"loss": 0.0, "note": b"fine"},
    )

    assert {m.key: m.value_float for m in receipt.update.metrics.all()} == {
        "loss": 0.0,
        "note": None,
    }
    assert not Metric.objects.filter(local_model=None).exists()
