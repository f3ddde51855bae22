"""Joining in: requirements before the first round, sample shares, and initial weights from a client."""

from datetime import timedelta
from typing import Any

import pytest
from django.utils import timezone
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from fl_server_ai.services.joining import client_join, initial_submit
from fl_server_ai.services.models import model_announce, weights_for
from fl_server_ai.services.reconciler import sweep
from fl_server_ai.services.tasks import task_failure, task_next
from fl_server_ai.services.trainings import training_create, training_start
from fl_server_core.exceptions import (
    BadContainer,
    Conflict,
    DuplicateUpdate,
    Invalid,
    NotPermitted,
    RoundClosed,
)
from fl_server_core.lifecycle import RoundPhase
from fl_server_core.models import Blob, Round, Task
from fl_server_core.services.clients import training_missing, training_shares
from fl_server_core.services.requirements import lacks
from fl_server_core.services.trainings import training_add_clients
from tests.scenes import Scene, person, scene, staged, weights

pytestmark = pytest.mark.django_db


def join(running: Scene, site: str, num_examples: int | None = None, **attributes: Any) -> list:
    return client_join(
        user=running.sites[site],
        capabilities=["train"],
        attributes=attributes,
        sdk_version="1.0",
        num_examples=num_examples,
    )


def overdue(running: Scene) -> None:
    Round.objects.filter(pk=running.round.pk).update(deadline=timezone.now() - timedelta(seconds=1))


def asked(running: Scene, kind: str = "train") -> set[str]:
    return {task.user.username for task in running.round.tasks.filter(kind=kind)}


# --- requirements ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("condition", "value", "met"),
    [
        ("de", "de", True),
        ("de", "fr", False),
        ("de", None, False),
        (["de", "fr"], "fr", True),
        ("cat", ["dog", "cat"], True),
        (["bird"], ["dog", "cat"], False),
        ({"min": 100}, 100, True),
        ({"min": 100}, 99, False),
        ({"min": 1, "max": 2}, 3, False),
        ({"min": 1}, "many", False),
        ({"min": 0}, True, False),
        (True, 1, False),
        (0, 0.0, True),
    ],
)
def test_a_condition_is_met_or_not(condition, value, met) -> None:
    assert (lacks({"it": condition}, {"it": value}) == []) is met


@given(st.dictionaries(st.text(max_size=5), st.integers() | st.booleans() | st.text(max_size=5)))
def test_who_has_exactly_what_is_required_lacks_nothing(require) -> None:
    assert lacks(require, dict(require)) == []
    assert {lack.name for lack in lacks(require, {})} == set(require)


def test_the_first_round_waits_until_everybody_has_what_is_required() -> None:
    running = scene("a", "b", require={"num_examples": {"min": 100}, "gpu": True})
    assert asked(running) == set()
    assert len(training_missing(running.now)) == 4
    assert "waits for 2 clients" in task_next(user=running.sites["a"])["reason"]

    assert join(running, "a", 500, gpu=True) == []
    (missing,) = join(running, "b", 20, gpu=True)
    assert missing.lack.text == "num_examples: at least 100 is required, it says 20"
    assert asked(running) == set()
    join(running, "b", 200, gpu=True)

    assert asked(running) == {"a", "b"}
    assert task_next(user=running.sites["a"])["state"] == "task"


def test_who_joins_before_the_round_asks_is_one_of_its_population() -> None:
    running = scene("a", require={"gpu": True})
    running.sites["b"] = person("b", client=True)
    training_add_clients(
        training=running.training, user=running.actor, clients=[running.sites["b"].pk]
    )

    join(running, "a", gpu=True)
    join(running, "b", gpu=True)

    assert asked(running) == {"a", "b"}
    assert running.round.policy["population"] == 2


def test_at_the_deadline_the_first_round_begins_with_those_who_have_it() -> None:
    running = scene("a", "b", "c", require={"gpu": True}, min_updates=2)
    join(running, "a", gpu=True)
    join(running, "b", gpu=True)
    join(running, "c", gpu=False)
    overdue(running)

    sweep()

    assert asked(running) == {"a", "b"}
    assert running.round.deadline > timezone.now()


def test_with_too_few_at_the_deadline_the_training_fails() -> None:
    running = scene("a", "b", require={"gpu": True}, min_updates=2)
    join(running, "a", gpu=True)
    overdue(running)

    sweep()

    assert running.now.state == "E"


def test_with_the_policy_wait_the_training_waits_past_the_deadline_for_those_who_join() -> None:
    running = scene("a", "b", require={"gpu": True}, min_updates=2, failure_policy="wait")
    join(running, "a", gpu=True)
    overdue(running)

    sweep()
    moved = running.round.deadline
    join(running, "b", gpu=True)

    assert moved > timezone.now()
    assert asked(running) == {"a", "b"}


def test_later_rounds_ask_whoever_has_it_then() -> None:
    running = scene("a", "b", require={"gpu": True}, skip_model_tests=True)
    for name in ("a", "b"):
        join(running, name, gpu=True)
    join(running, "b", gpu=False)
    for name in ("a", "b"):
        running.send(name, 1.0)
    running.work()

    assert asked(running) == {"a"}


def test_sample_shares_are_known_before_anything_is_trained() -> None:
    running = scene("a", "b", "c", started=False)
    join(running, "a", 300)
    join(running, "b", 100)

    shares = {share.user.username: share.share for share in training_shares(running.training)}

    assert shares == {"a": 0.75, "b": 0.25, "c": None}


def test_only_clients_join() -> None:
    with pytest.raises(NotPermitted):
        client_join(
            user=person("x"), capabilities=[], attributes={}, sdk_version="", num_examples=None
        )


@pytest.mark.parametrize(
    ("require", "pointer"),
    [
        ({"gpu": {}}, "/options/require/gpu"),
        ({"gpu": {"least": 1}}, "/options/require/gpu"),
        ({"gpu": {"min": "1"}}, "/options/require/gpu"),
        ({"gpu": []}, "/options/require/gpu"),
        ({"gpu": None}, "/options/require/gpu"),
        (["gpu"], "/options/require"),
        ({str(n): 1 for n in range(51)}, "/options/require"),
    ],
)
def test_a_requirement_that_means_nothing_is_refused(require, pointer) -> None:
    with pytest.raises(Invalid) as refusal:
        scene("a", started=False, require=require)

    assert refusal.value.data["errors"][0]["pointer"] == pointer


# --- initial weights ---------------------------------------------------------------------------


def announced(*names: str, endpoint: str = "", **options: Any) -> Scene:
    """A started training of a model without weights."""
    actor = person("actor", actor=True)
    sites = {name: person(name, client=True, message_endpoint=endpoint) for name in names}
    model = model_announce(owner=actor, name="new", description="")
    training = training_create(
        actor=actor,
        model=model,
        target_num_updates=2,
        aggregation_method="FedAvg",
        options={"skip_model_tests": True, **options},
        clients=[user.pk for user in sites.values()],
    )
    training_start(training=training, user=actor)
    return Scene(actor, sites, model, training)


def provider(running: Scene) -> str:
    (task,) = running.round.tasks.filter(kind="initial_weights", state="open")
    return task.user.username


def provide(running: Scene, site: str, value: float = 5.0) -> tuple[Task, bool, str]:
    return initial_submit(
        task=running.task(site, "initial_weights"),
        owner=running.sites[site],
        file=staged(save(weights(value))),
        sha256=None,
    )


def test_one_client_is_asked_and_what_it_sends_is_version_0_for_all() -> None:
    running = announced("a", "b", "c")
    site = provider(running)
    others = {"a", "b", "c"} - {site}
    task = task_next(user=running.sites[site])["task"]
    assert task["kind"] == "initial_weights"
    assert task["upload_url"] == f"/api/tasks/{task['id']}/result/"
    for name in others:
        assert "waits for the initial weights" in task_next(user=running.sites[name])["reason"]

    _, created, digest = provide(running, site)

    assert created
    assert asked(running) == {"a", "b", "c"}
    for name in "abc":
        model = task_next(user=running.sites[name])["task"]["model"]
        assert (model["version"], model["sha256"]) == (0, digest)
    for name in "abc":
        running.send(name, 7.0)
    running.work()
    assert running.current()["layer.bias"].tolist() == [7.0] * 3
    assert running.now.base_version.blob.digest == digest


def test_the_same_weights_again_are_fine_and_others_are_not() -> None:
    running = announced("a", "b")
    site = provider(running)
    provide(running, site)

    assert not provide(running, site)[1]
    with pytest.raises(DuplicateUpdate):
        provide(running, site, 6.0)


def test_if_the_first_fails_another_is_asked_and_at_the_end_the_training_fails() -> None:
    running = announced("a", "b")
    first = provider(running)
    task_failure(
        task=running.task(first, "initial_weights"), user=running.sites[first], code="X", text=""
    )
    second = provider(running)
    assert second != first
    with pytest.raises(RoundClosed):
        provide(running, first)

    overdue(running)
    sweep()

    assert running.now.state == "E"
    assert running.now.reason.startswith("NO_INITIAL_WEIGHTS: 2 participants")


def test_with_the_policy_wait_the_first_ones_are_asked_again() -> None:
    running = announced("a", failure_policy="wait")
    task_failure(
        task=running.task("a", "initial_weights"), user=running.sites["a"], code="X", text=""
    )

    assert running.task("a", "initial_weights").attempt == 2
    provide(running, "a")
    assert asked(running) == {"a"}


def test_only_who_may_take_part_is_asked_for_weights() -> None:
    running = announced("a", "b", require={"gpu": True})
    join(running, "b", gpu=True)

    assert provider(running) == "b"


def test_a_model_without_weights_says_so_and_takes_no_empty_ones() -> None:
    running = announced("a")
    with pytest.raises(Conflict) as refusal:
        weights_for(model=running.now.model, user=running.actor)
    assert refusal.value.error_code == "NO_WEIGHTS"

    with pytest.raises(BadContainer):
        initial_submit(
            task=running.task("a", "initial_weights"),
            owner=running.sites["a"],
            file=staged(save({})),
            sha256=None,
        )

    before = Blob.objects.count()
    provide(running, "a")
    assert Blob.objects.filter(doomed_at=None).count() <= before
    assert running.round.phase in {RoundPhase.NOTIFYING, RoundPhase.COLLECTING}


def test_with_the_policy_wait_weights_are_waited_for_until_somebody_may_be_asked() -> None:
    running = announced("a", "b", failure_policy="wait", require={"gpu": True})
    overdue(running)

    sweep()
    moved = running.round.deadline
    for name in ("a", "b"):
        join(running, name, gpu=True)

    assert moved > timezone.now()
    assert running.now.state == "O"
    assert provider(running) in {"a", "b"}
