"""Every strategy in a running training: created, two rounds, its state carried, a killed worker."""

from datetime import timedelta
from typing import Any

import numpy as np
import pytest
from django.utils import timezone
from safetensors.numpy import save

from fl_server_ai.aggregation import STRATEGIES
from fl_server_ai.services.tasks import task_failure
from fl_server_ai.services.training_options import strategy_of, strategy_schema
from fl_server_ai.services.updates import update_submit
from fl_server_ai.trainer.tasks import process_trainer_task
from fl_server_core.exceptions import Conflict, Invalid
from fl_server_core.models import ModelVersion, TrainerEvent
from fl_server_core.services.events import event_claim
from fl_server_core.storage import local_path
from tests.scenes import Scene, scene, staged, weights

pytestmark = pytest.mark.django_db
SITES = ("ada", "grace", "joan", "mary", "emmy", "lise", "rosa")
NEEDED: dict[str, dict[str, Any]] = {
    "FedDC": {"daisy_chain_period": 1},
    "FedBuff": {"buffer_size": len(SITES)},
    "Krum": {"f": 2},
    "MultiKrum": {"f": 2},
    "Bulyan": {"f": 1},
}


def running(name: str, **options: Any) -> Scene:
    options = {**NEEDED.get(name, {}), **options}
    made = scene(*SITES, method=name, skip_model_tests=True, **options)
    if name == "FLTrust":
        made.training.options["root"] = str(made.sites["ada"].pk)
        made.training.save()
    made.training.refresh_from_db()
    return made


def send(training: Scene, site: str, value: float, samples: int) -> None:
    """An update with whatever the strategy wants beside it."""
    strategy = strategy_of(training.training)
    tensors = weights(float(value % 2 == 0) if strategy.takes == "mask" else value)
    for extra in strategy.extras():
        if extra.per_tensor:
            floats = [name for name in tensors if tensors[name].dtype.kind == "f"]
            tensors |= {f"extra.{extra.name}.{name}": tensors[name] * 0.5 for name in floats}
        elif extra.required:
            tensors[f"extra.{extra.name}"] = np.array(value)
    update_submit(
        model_id=training.training.model_id,
        owner=training.sites[site],
        round=training.now.model.round,
        sample_size=samples,
        file=staged(save(tensors)),
        sha256=None,
        metrics={},
        num_steps=4,
    )


def send_all(training: Scene) -> TrainerEvent:
    for index, site in enumerate(SITES):
        send(training, site, 1.0 + index + training.now.model.round, 1 + index)
    return TrainerEvent.objects.get(round=training.round, state="pending")


def version(training: Scene, number: int) -> ModelVersion:
    found = ModelVersion.objects.select_related("blob", "strategy_state")
    return found.get(model_id=training.training.model_id, number=number)


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name != "FedAsync"])
def test_a_training_goes_through_two_rounds_and_its_state_goes_with_it(name: str) -> None:
    training = running(name)

    for _ in range(2):
        send_all(training)
        training.work()

    assert (training.now.state, training.now.model.round) == ("C", 2)
    strategy = strategy_of(training.training)
    states = [version(training, number).strategy_state for number in (1, 2)]
    remembers = bool(strategy.state_blocks or strategy.state_dict())
    assert [state is not None for state in states] == [remembers] * 2
    if remembers:
        assert states[0].digest != states[1].digest
    final = training.current()
    assert all(np.isfinite(values).all() for values in final.values())
    assert float(np.abs(final["layer.bias"]).max()) > 0


def test_what_the_second_round_makes_depends_on_the_first_ones_state() -> None:
    training = running("FedAvgM", momentum=0.5, weighting="uniform")

    send_all(training)
    training.work()
    assert training.current()["layer.bias"].tolist() == [4.0] * 3  # mean of 1 to 7, from 0
    send_all(training)
    training.work()

    assert training.current()["layer.bias"].tolist() == [5.0 + 0.5 * 4.0] * 3


@pytest.mark.parametrize("name", ["FedAdam", "FedYogi", "FedAvgM"])
def test_a_worker_killed_in_the_second_round_leaves_the_same_bytes(name: str) -> None:
    made = []
    for killed in (False, True):
        training = running(name)
        send_all(training)
        training.work()
        event = send_all(training)
        if killed:
            assert event_claim(event_id=event.pk) is not None  # and never heard of again
            past = timezone.now() - timedelta(seconds=1)
            TrainerEvent.objects.filter(pk=event.pk).update(lease_until=past)
        process_trainer_task(event.pk)
        last = version(training, 2)
        with local_path(last.strategy_state) as path:
            made.append((training.digest(), path.read_bytes()))
        for user in (training.actor, *training.sites.values()):
            user.username = f"before-{user.pk}"
            user.save()

    assert made[0] == made[1]


def test_a_training_that_never_has_enough_updates_for_krum_does_not_start() -> None:
    with pytest.raises(Conflict) as refusal:
        scene("ada", "grace", method="Krum", f=2, skip_model_tests=True)

    assert refusal.value.error_code == "POLICY_UNSATISFIABLE"
    assert "needs 7 updates" in refusal.value.detail


def test_a_round_that_lost_too_many_for_krum_ends_the_training_with_the_numbers() -> None:
    training = running("Krum", f=2)
    for index, site in enumerate(SITES):
        if index < 6:
            training.send(site, 1.0)
        else:
            task_failure(task=training.task(site), user=training.sites[site], code="X", text="")

    assert training.now.state == "E"
    assert "ended with 6 of 7 updates, 7 are needed" in training.now.reason


@pytest.mark.parametrize(
    ("name", "options", "pointer"),
    [
        ("Krum", {"f": -1}, "/options/f"),
        ("Krum", {}, "/options/f"),
        ("MultiKrum", {"m": 3}, "/options/f"),
        ("Bulyan", {"selection": "oneshot"}, "/options/f"),
        ("TrimmedMean", {"beta": 0.5}, "/options/beta"),
        ("FedAdam", {"beta1": 0.9}, "/options/beta1"),
        ("FedYogi", {"eta": "fast"}, "/options/eta"),
    ],
)
def test_a_wrong_option_is_refused_when_a_training_is_made(
    name: str, options: dict[str, Any], pointer: str
) -> None:
    with pytest.raises(Invalid) as refusal:
        scene(started=False, method=name, **options)

    assert [fault["pointer"] for fault in refusal.value.data["errors"]] == [pointer]


@pytest.mark.parametrize("name", ["Krum", "MultiKrum", "Bulyan"])
def test_as_many_bad_updates_as_the_rule_stands_must_be_asked_for(name: str) -> None:
    running = scene(*SITES, method=name, skip_model_tests=True, f=None)
    for index, site in enumerate(SITES):
        send(running, site, float(index), 1)

    running.work()

    assert running.now.model.round == 1
    assert "f" in strategy_schema(name)["required"]
