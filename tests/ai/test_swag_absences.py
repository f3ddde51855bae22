"""Who says no to a SWAG round, or says nothing: it costs that round his moments, and never holds the training up."""

import json
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from fl_server_ai.services.moments import moments_submit
from fl_server_ai.services.reconciler import sweep
from fl_server_ai.services.tasks import task_failure
from fl_server_ai.services.trainings import training_clients_remove
from fl_server_core.lifecycle import TaskState, TrainingState
from fl_server_core.models import Round, SwagMoments, Task
from tests.ai.test_notifications import Endpoint, answering, paths_apart, send_all
from tests.scenes import Scene, scene, staged

pytestmark = pytest.mark.django_db(transaction=True)
FIRST = {"layer.bias": np.array([1.0, 2.0, 3.0])}
SECOND = {"layer.bias": np.array([2.0, 4.0, 9.5])}


@pytest.fixture
def endpoint(settings: Any) -> Iterator[Endpoint]:
    settings.FL_WEBHOOK_ALLOW_PRIVATE = True
    found = Endpoint()
    yield found
    found.close()


def refusing_swag(endpoint: Endpoint, path: str) -> None:
    """A client that knows no SWAG rounds, as existing ones do not, answers 501 to them."""

    def behave(handler: BaseHTTPRequestHandler) -> None:
        (*_, raw) = [raw for at, _, raw in endpoint.requests if at == path]
        swag = json.loads(raw)["notification_type"] == "SWAG_ROUND_START"
        answering(501 if swag else 200)(handler)

    endpoint.at[path] = behave


def send_moments(told: Scene, site: str) -> None:
    moments_submit(
        model_id=told.training.model_id, owner=told.sites[site], round=told.now.model.round,
        sample_size=1, first=staged(save(FIRST)), second=staged(save(SECOND)),
    )  # fmt: skip


def test_a_rejection_leaves_the_swag_round_and_not_the_training(endpoint: Endpoint) -> None:
    told = scene(
        rounds=2, uncertainty="SWAG", endpoint=endpoint.url, swag_rounds="every",
        skip_model_tests=True,
    )  # fmt: skip
    paths_apart(told, endpoint)
    refusing_swag(endpoint, "/grace")
    failures = []
    for _ in range(2):
        send_all()
        told.send("ada", 1.0)
        told.send("grace", 3.0)
        told.work()
        assert told.now.state == TrainingState.SWAG_ROUND
        send_all()
        failures.append((told.task("grace", "swag").state, told.task("grace", "swag").failure))
        send_moments(told, "ada")
        told.work()
    send_all()

    assert failures == [(TaskState.FAILED, "REJECTED: answered 501")] * 2
    assert told.now.state == TrainingState.COMPLETED
    assert SwagMoments.objects.filter(owner=None, sample_size=1).count() == 2
    assert told.training.memberships.get(user=told.sites["grace"]).removed_at is None
    assert endpoint.types("/grace") == [
        "TRAINING_START", "UPDATE_ROUND_START", "SWAG_ROUND_START", "UPDATE_ROUND_START",
        "SWAG_ROUND_START", "TRAINING_FINISHED",
    ]  # fmt: skip


def reject(told: Scene, endpoint: Endpoint) -> None:
    endpoint.behave = answering(501)
    send_all()


def fail(told: Scene, endpoint: Endpoint) -> None:
    for site in told.sites:
        task = Task.objects.get(user=told.sites[site], kind="swag")
        task_failure(task=task, user=told.sites[site], code="SWAG_NOT_IMPLEMENTED", text="no")


def leave(told: Scene, endpoint: Endpoint) -> None:
    clients = [user.pk for user in told.sites.values()]
    training_clients_remove(training=told.training, user=told.actor, clients=clients)


def say_nothing(told: Scene, endpoint: Endpoint) -> None:
    Round.objects.update(deadline="2020-01-01T00:00:00Z")
    sweep()


def send_too_late(told: Scene, endpoint: Endpoint) -> None:
    """One of the two that the policy wants."""
    send_moments(told, "ada")
    say_nothing(told, endpoint)


@pytest.mark.parametrize("absence", [reject, fail, leave, say_nothing, send_too_late])
def test_a_swag_round_without_enough_moments_ends_with_that_reason(
    endpoint: Endpoint, absence: Callable[[Scene, Endpoint], None]
) -> None:
    told = scene(rounds=1, uncertainty="SWAG", endpoint=endpoint.url, min_updates=2)
    told.send("ada", 1.0)
    told.send("grace", 3.0)
    told.work()
    assert told.now.state == TrainingState.SWAG_ROUND

    absence(told, endpoint)
    told.work()

    assert told.now.state == TrainingState.ERROR
    assert told.now.reason.startswith("NOT_ENOUGH_MOMENTS")
    assert not SwagMoments.objects.filter(owner=None).exists()
