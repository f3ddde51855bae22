"""Bad updates: kept out of the round with a reason, released or refused by a person, checked by plug-ins."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
from django.utils import timezone
from rest_framework.test import APIClient

from fl_server_ai.aggregation import STRATEGIES
from fl_server_ai.aggregation.outliers import cosines, norms
from fl_server_ai.aggregation.strategies.fed_avg import FedAvg
from fl_server_ai.aggregation.strategy import Refused, UpdateMeta
from fl_server_ai.services.controls import training_retry
from fl_server_ai.services.quarantine import update_refuse, update_release
from fl_server_ai.services.reconciler import sweep
from fl_server_ai.trainer.events import event_kind
from fl_server_ai.trainer.judging import updates_judge
from fl_server_ai.trainer.model_trainer import ModelTrainer
from fl_server_ai.trainer.tasks import process_trainer_task
from fl_server_core.exceptions import IllegalMove, Invalid, NotPermitted, RoundClosed
from fl_server_core.lifecycle import RoundPhase, TaskState, TrainingState
from fl_server_core.models import Blob, LocalModel, TrainerEvent, User
from fl_server_core.selectors import Part, part_of
from fl_server_core.services.events import event_claim
from fl_server_core.services.tokens import token_issue
from tests.scenes import Scene, person, scene

pytestmark = pytest.mark.django_db


def states(running: Scene) -> dict[str, str]:
    found = LocalModel.objects.filter(training=running.training).select_related("owner")
    return {update.owner.username: update.state for update in found}


def update_of(running: Scene, site: str) -> LocalModel:
    return LocalModel.objects.get(training=running.training, owner=running.sites[site])


def close(running: Scene) -> None:
    """Let workers do whatever there is, until the round is aggregated or waits."""
    for _ in range(5):
        if running.round.phase != RoundPhase.COLLECTING or not running.work():
            return


# --- the numbers ------------------------------------------------------------------------------


def test_norms_and_cosines_are_those_of_a_reference() -> None:
    moves = np.random.default_rng(7).normal(size=(5, 40))
    moves[3] *= -20.0

    gram = torch.from_numpy(moves @ moves.T)

    assert np.allclose(norms(gram), np.linalg.norm(moves, axis=1))
    units = moves / np.linalg.norm(moves, axis=1, keepdims=True)
    for k, found in enumerate(cosines(gram)):
        others = np.delete(units, k, axis=0).mean(axis=0)
        assert found == pytest.approx(units[k] @ others / np.linalg.norm(others))


def test_what_did_not_move_has_no_direction_and_two_are_too_few_to_compare() -> None:
    moves = np.array([[1.0, 0.0], [0.0, 0.0], [1.0, 0.1], [-1.0, 0.0]])

    assert cosines(torch.from_numpy(moves @ moves.T))[1] is None
    assert cosines(torch.from_numpy(moves[[0, 3]] @ moves[[0, 3]].T)) == [None, None]


def test_an_update_so_large_that_its_square_overflows_is_infinitely_far() -> None:
    gram = torch.tensor([[float("inf"), float("nan")], [float("nan"), 1.0]], dtype=torch.float64)

    assert norms(gram) == [float("inf"), 1.0]


# --- norm bound -------------------------------------------------------------------------------


def test_an_update_that_goes_too_far_does_not_count_and_its_owner_sees_why() -> None:
    running = scene("ada", "grace", "mallory", max_update_norm=10.0)
    running.send("ada", 1.0)
    running.send("mallory", 1_000.0)
    running.work()

    assert states(running) == {"ada": "accepted", "mallory": "quarantined"}
    part = running.task("mallory")
    assert part.state == TaskState.CANCELLED
    assert part.failure.startswith("QUARANTINED: NORM: |update - base| is 3000, max_update_norm")
    assert part_of(part, part.created_at) == Part.QUARANTINED
    assert running.round.phase == RoundPhase.COLLECTING

    running.send("grace", 3.0)
    close(running)
    running.work()

    assert np.allclose(running.current()["layer.bias"], 2.0)


def test_quarantine_closes_the_round_at_once_if_it_was_the_last_one_waited_for() -> None:
    running = scene("ada", "mallory", max_update_norm=10.0)
    running.send("ada", 1.0)
    running.send("mallory", 1_000.0)

    assert running.round.phase == RoundPhase.COLLECTING
    assert running.work() == 1  # both at once

    assert running.round.phase == RoundPhase.AGGREGATING


def test_a_round_without_any_update_left_ends_as_its_policy_says() -> None:
    running = scene("mallory", max_update_norm=10.0)
    running.send("mallory", 1_000.0)
    running.work()

    assert running.now.state == TrainingState.ERROR
    assert running.now.reason.startswith("NOT_ENOUGH_UPDATES")


def test_the_failure_policy_wait_does_not_wait_for_ever() -> None:
    running = scene("mallory", max_update_norm=10.0, failure_policy="wait")
    running.send("mallory", 1_000.0)
    running.work()

    assert running.now.state == TrainingState.ERROR


def test_the_same_update_again_is_still_the_same_and_another_is_refused() -> None:
    running = scene("ada", "mallory", max_update_norm=10.0)
    first = running.send("mallory", 1_000.0)
    running.work()

    again = running.send("mallory", 1_000.0)

    assert (again.created, again.update.pk) == (False, first.update.pk)
    with pytest.raises(RoundClosed) as refusal:
        running.send("mallory", 1.0)
    assert refusal.value.error_code == "TASK_CLOSED"


def test_without_these_options_updates_are_accepted_in_the_request() -> None:
    running = scene()
    running.send("ada", 1_000.0)

    assert states(running) == {"ada": "accepted"}
    assert not TrainerEvent.objects.exists()


# --- outliers ---------------------------------------------------------------------------------


def test_who_goes_the_other_way_is_quarantined_once_the_round_could_close() -> None:
    running = scene("ada", "grace", "mallory", "zoe", quarantine_cosine=0.0)
    for site, value in (("ada", 1.0), ("grace", 2.0), ("mallory", -5.0)):
        running.send(site, value)

    assert running.work() == 0  # more may come
    running.send("zoe", 3.0)
    close(running)
    running.work()

    assert states(running)["mallory"] == "quarantined"
    assert update_of(running, "mallory").reason.startswith("COSINE: ")
    assert np.allclose(running.current()["layer.bias"], 2.0)


def test_at_a_deadline_those_that_are_there_are_compared() -> None:
    running = scene("ada", "grace", "mallory", "zoe", quarantine_cosine=0.0)
    for site, value in (("ada", 1.0), ("grace", 2.0), ("mallory", -5.0)):
        running.send(site, value)
    type(running.round).objects.update(deadline=timezone.now() - timedelta(seconds=1))
    sweep()
    close(running)
    running.work()

    assert states(running) == {"ada": "consumed", "grace": "consumed", "mallory": "quarantined"}
    assert running.now.model.round == 1


# --- release and refusal ----------------------------------------------------------------------


def test_a_released_update_counts_if_its_round_is_open() -> None:
    running = scene("ada", "mallory", max_update_norm=10.0)
    running.send("mallory", 1_000.0)
    running.work()

    for _ in range(2):
        update_release(update=update_of(running, "mallory"), user=running.actor)

    assert running.task("mallory").state == TaskState.DONE
    assert "released by actor; was: NORM" in update_of(running, "mallory").reason
    running.send("ada", 0.0)
    close(running)
    running.work()
    assert np.allclose(running.current()["layer.bias"], 500.0)


def test_a_release_of_the_last_one_waited_for_closes_the_round() -> None:
    running = scene("ada", "mallory", max_update_norm=10.0)
    running.send("mallory", 1_000.0)
    running.work()
    running.send("ada", 1.0)
    update_release(update=update_of(running, "mallory"), user=person("root", is_superuser=True))

    close(running)

    assert running.round.phase == RoundPhase.AGGREGATING


def test_a_release_after_its_round_is_refused_with_the_reason() -> None:
    running = scene("ada", "mallory", max_update_norm=10.0)
    running.send("ada", 1.0)
    running.send("mallory", 1_000.0)
    running.work()

    with pytest.raises(RoundClosed, match="has gone on without this update"):
        update_release(update=update_of(running, "mallory"), user=running.actor)

    assert states(running)["mallory"] == "quarantined"


def test_a_failed_round_counts_it_after_release_and_retry() -> None:
    running = scene("mallory", max_update_norm=10.0)
    running.send("mallory", 1_000.0)
    running.work()
    update_release(update=update_of(running, "mallory"), user=running.actor)

    training_retry(training=running.now, user=running.actor)
    running.work()

    assert np.allclose(running.current()["layer.bias"], 1_000.0)


def test_a_refused_one_gives_up_its_files_and_stays_refused() -> None:
    running = scene("ada", "mallory", max_update_norm=10.0)
    running.send("mallory", 1_000.0)
    running.work()
    blob = update_of(running, "mallory").blob_id

    for _ in range(2):
        update_refuse(update=update_of(running, "mallory"), user=running.actor)

    assert states(running) == {"mallory": "refused"}
    assert Blob.objects.get(pk=blob).doomed_at is not None
    with pytest.raises(IllegalMove):
        update_release(update=update_of(running, "mallory"), user=running.actor)


def test_only_the_actor_and_admins_decide() -> None:
    running = scene("ada", "mallory", max_update_norm=10.0)
    running.send("mallory", 1_000.0)
    running.work()

    for act in (update_release, update_refuse):
        with pytest.raises(NotPermitted):
            act(update=update_of(running, "mallory"), user=running.sites["mallory"])


def test_what_is_in_quarantine_when_a_training_ends_is_refused() -> None:
    running = scene("ada", "mallory", rounds=1, max_update_norm=10.0, skip_model_tests=True)
    running.send("ada", 1.0)
    running.send("mallory", 1_000.0)
    close(running)
    running.work()
    assert running.now.state == TrainingState.COMPLETED

    sweep()

    kept = update_of(running, "mallory")
    assert (kept.state, kept.blob) == ("refused", None)
    assert kept.reason.startswith("NORM")


# --- crashes ----------------------------------------------------------------------------------


def test_a_worker_that_dies_before_or_after_its_commit_loses_and_doubles_nothing() -> None:
    running = scene("ada", "mallory", max_update_norm=10.0)
    running.send("ada", 1.0)
    running.send("mallory", 1_000.0)
    pending = TrainerEvent.objects.get()
    dead = event_claim(event_id=pending.pk)  # before
    assert dead is not None
    TrainerEvent.objects.update(lease_until=None, state="pending")

    second = event_claim(event_id=pending.pk)  # committed its verdicts, then died
    assert second is not None
    trainer = ModelTrainer(second.training, work=second)
    event_kind(second.type)(trainer).handle()
    assert states(running) == {"ada": "accepted", "mallory": "quarantined"}
    updates_judge(dead.training, dead.round, trainer.options, dead)  # the first was only slow
    TrainerEvent.objects.update(lease_until=None, state="pending")
    process_trainer_task(pending.pk)

    assert states(running) == {"ada": "accepted", "mallory": "quarantined"}
    assert running.round.phase == RoundPhase.AGGREGATING


def test_what_arrives_while_a_worker_is_at_it_gets_its_own_event() -> None:
    running = scene("ada", "grace", max_update_norm=10.0)
    running.send("ada", 1.0)
    work = event_claim(event_id=TrainerEvent.objects.get().pk)
    assert work is not None
    trainer = ModelTrainer(work.training, work=work)
    event = event_kind(work.type)(trainer)
    event.handle()
    running.send("grace", 3.0)
    assert TrainerEvent.objects.count() == 1
    trainer.handle(event)

    close(running)
    running.work()

    assert np.allclose(running.current()["layer.bias"], 2.0)


# --- plug-ins ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _NoOptions:
    pass


class Careful(FedAvg):
    """Refuses what is negative, halves what is large, and leaves the rest."""

    Options: Any = _NoOptions

    def weights(self, metas: Any, gram: Any) -> list[float]:
        return [1.0] * len(metas)

    def check(
        self, meta: UpdateMeta, tensors: Mapping[str, torch.Tensor]
    ) -> Refused | Mapping[str, torch.Tensor] | None:
        bias = tensors["layer.bias"]
        if bool((bias < 0).any()):
            return Refused(f"NEGATIVE: {meta.num_examples} examples, and a bias below zero")
        if float(bias.max()) == 99.0:
            return {"layer.bias": bias}
        if float(bias.max()) > 10:
            return {n: t if n == "steps" else t / 2 for n, t in tensors.items()}
        return None


@pytest.fixture
def careful(monkeypatch) -> None:
    assert "FedAvg" in STRATEGIES  # which loads them all
    monkeypatch.setitem(STRATEGIES._items, "Careful", Careful)


def test_a_strategy_refuses_and_transforms_updates(careful) -> None:
    running = scene("ada", "grace", "mallory", method="Careful")
    running.send("ada", 4.0)
    running.send("mallory", -1.0, samples=7)
    running.send("grace", 20.0)
    close(running)
    sent = update_of(running, "grace")
    assert sent.blob is not None
    assert sent.blob.digest != sent.digest
    running.work()

    assert states(running) == {"ada": "consumed", "grace": "consumed", "mallory": "refused"}
    assert update_of(running, "mallory").reason.startswith("NEGATIVE: 7 examples")
    assert running.task("mallory").failure.startswith("UPDATE_REFUSED: NEGATIVE")
    assert np.allclose(running.current()["layer.bias"], 7.0)
    assert running.send("grace", 20.0, round=0).created is False  # its own bytes again


def test_a_strategy_that_gives_other_tensors_back_ends_the_training_with_its_name(careful) -> None:
    running = scene("ada", method="Careful")
    running.send("ada", 99.0)
    running.work()

    assert running.now.state == TrainingState.ERROR
    assert "Careful.check gave back other tensors" in running.now.reason


# --- options ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "pointer"),
    [
        ({"max_update_norm": 0.0}, "/options/max_update_norm"),
        ({"quarantine_cosine": 2.0}, "/options/quarantine_cosine"),
        ({"max_update_norm": 1.0, "late_updates": "next_round"}, "/options/late_updates"),
        ({"max_update_norm": 1.0, "mode": "buffered", "buffer_size": 2}, "/options/mode"),
        ({"quarantine_cosine": 0.1, "daisy_chain_period": 2}, "/options/quarantine_cosine"),
        ({"max_update_norm": 1.0, "method": "FedSGD"}, "/options/max_update_norm"),
    ],
)
def test_what_cannot_be_checked_is_refused_with_a_pointer(options, pointer) -> None:
    with pytest.raises(Invalid) as refusal:
        scene(started=False, **options)

    assert refusal.value.data["errors"][0]["pointer"] == pointer


# --- over HTTP and in the admin ---------------------------------------------------------------


def test_the_site_and_the_actor_read_why_and_the_actor_releases_it(client) -> None:
    running = scene("ada", "mallory", max_update_norm=10.0)
    running.send("mallory", 1_000.0)
    running.work()
    update = update_of(running, "mallory")
    models = f"/api/trainings/{running.training.pk}/models/"

    def ask(user: User, method: str, url: str) -> Any:
        asking = APIClient()
        asking.credentials(HTTP_AUTHORIZATION=f"Token {token_issue(user=user)}")
        return getattr(asking, method)(url)

    for reader in (running.sites["mallory"], running.actor):
        [shown] = [one for one in ask(reader, "get", models).json() if one["id"] == str(update.pk)]
        assert (shown["state"], shown["reason"][:5]) == ("quarantined", "NORM:")
    rounds = ask(running.sites["ada"], "get", models.replace("models", "rounds")).json()
    assert rounds[0]["excluded"] == [
        {"user": str(running.sites["mallory"].pk), "part": "quarantined", "code": "QUARANTINED"}
    ]

    answer = ask(running.actor, "post", f"/api/updates/{update.pk}/release/")
    late = ask(running.actor, "post", f"/api/updates/{update.pk}/refuse/")

    assert (answer.status_code, answer.json()["state"]) == (200, "accepted")
    assert (late.status_code, late.json()["code"]) == (409, "ILLEGAL_STATE")


def test_an_admin_releases_and_refuses_in_the_admin(client) -> None:
    running = scene("ada", "mallory", "eve", max_update_norm=10.0)
    running.send("mallory", 1_000.0)
    running.send("eve", 1_000.0)
    running.work()
    client.force_login(person("root", is_superuser=True, is_staff=True))

    for site, action in (("mallory", "release"), ("eve", "refuse")):
        update = update_of(running, site)
        client.post(
            "/admin/fl_server_core/localmodel/",
            {"action": action, "_selected_action": [str(update.pk)]},
        )

    assert states(running) == {"mallory": "accepted", "eve": "refused"}
