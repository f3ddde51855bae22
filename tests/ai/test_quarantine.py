"""Bad updates: kept out of the round with a reason, released or refused by a person, checked by plug-ins."""

import errno
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
from django.utils import timezone
from rest_framework.test import APIClient
from safetensors.numpy import load, save

import fl_client
from fl_server_ai.aggregation import STRATEGIES
from fl_server_ai.aggregation.outliers import cosines, norms
from fl_server_ai.aggregation.strategies.fed_avg import FedAvg
from fl_server_ai.aggregation.strategy import Refused, UpdateMeta
from fl_server_ai.services.controls import training_pause, training_resume, training_retry
from fl_server_ai.services.quarantine import update_refuse, update_release
from fl_server_ai.services.reconciler import event_give_up, sweep
from fl_server_ai.services.tasks import task_next
from fl_server_ai.services.trainings import training_clients_remove, training_start
from fl_server_ai.services.updates import update_submit
from fl_server_ai.trainer.judging import updates_judge
from fl_server_ai.trainer.kinds import event_kind
from fl_server_ai.trainer.model_trainer import ModelTrainer
from fl_server_ai.trainer.tasks import process_trainer_task
from fl_server_core.exceptions import IllegalMove, Invalid, NotPermitted, RoundClosed
from fl_server_core.lifecycle import RoundPhase, TaskState, TrainingState, UpdateState
from fl_server_core.models import Blob, LocalModel, Round, TrainerEvent, User
from fl_server_core.selectors import Part, part_of
from fl_server_core.selectors.own_updates import OwnUpdates, own_updates
from fl_server_core.services.blocked import blocked_on
from fl_server_core.services.events import event_claim
from fl_server_core.services.tokens import token_issue
from fl_server_core.services.trainings import training_add_clients
from fl_server_core.storage import local_path
from tests.scenes import Scene, person, scene, staged, weights

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


def overdue(running: Scene) -> None:
    """The deadline passes, and a sweep finds it."""
    Round.objects.filter(pk=running.round.pk).update(deadline=timezone.now() - timedelta(seconds=1))
    sweep()


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
    overdue(running)
    running.work()

    assert np.allclose(running.current()["layer.bias"], 2.0)


def test_an_update_whose_file_was_lost_before_the_look_is_asked_for_again() -> None:
    running = scene("ada", "grace", max_update_norm=10.0, refused_retries=1)
    running.send("ada", 1.0)
    with local_path(update_of(running, "ada").blob) as path:
        path.unlink()

    running.work()

    update = update_of(running, "ada")
    assert (update.state, update.reason) == (
        UpdateState.REFUSED,
        "UPDATE_LOST: its file has disappeared",
    )
    assert running.task("ada").state == TaskState.OPEN


def test_a_round_waits_for_a_decision_until_its_deadline_and_says_whose() -> None:
    running = scene("ada", "mallory", max_update_norm=10.0)
    running.send("ada", 1.0)
    running.send("mallory", 1_000.0)

    assert running.work() == 1  # both at once
    assert running.work() == 0
    found = blocked_on(training=running.now, visible_to=running.actor)
    overdue(running)

    assert found is not None
    assert (found.code, found.until) == ("QUARANTINE", running.round.deadline or found.until)
    assert [who.name for who in found.who] == ["actor"]
    assert "In quarantine is what mallory sent" in found.text
    assert "it goes on with the 1 that are in" in found.text
    assert running.round.phase == RoundPhase.AGGREGATING


def test_with_the_policy_refuse_a_round_does_not_wait_for_anybody() -> None:
    running = scene("ada", "mallory", max_update_norm=10.0, bad_updates="refuse")
    running.send("ada", 1.0)
    running.send("mallory", 1_000.0)
    running.work()

    assert states(running) == {"ada": "accepted", "mallory": "refused"}
    part = running.task("mallory")
    assert part_of(part, part.created_at) == Part.REFUSED
    assert running.round.phase == RoundPhase.AGGREGATING
    assert update_of(running, "mallory").blob is None


def test_a_round_without_any_update_left_ends_as_its_policy_says() -> None:
    running = scene("mallory", max_update_norm=10.0)
    running.send("mallory", 1_000.0)
    running.work()
    overdue(running)

    assert running.now.state == TrainingState.ERROR
    assert running.now.reason.startswith("NOT_ENOUGH_UPDATES")
    assert "1 x QUARANTINED" in running.now.reason


def test_a_missing_decision_on_a_required_site_is_a_missing_update() -> None:
    mallory = person("mallory", client=True)
    running = scene("ada", max_update_norm=10.0, started=False, required=[str(mallory.pk)])
    training_add_clients(training=running.training, user=running.actor, clients=[mallory.pk])
    running.sites["mallory"] = mallory
    training_start(training=running.training, user=running.actor)
    running.send("ada", 1.0)
    running.send("mallory", 1_000.0)
    running.work()
    overdue(running)

    assert running.now.state == TrainingState.ERROR
    assert running.now.reason.startswith("NOT_ENOUGH_UPDATES")


def test_with_the_failure_policy_wait_the_deadline_moves_until_somebody_decides() -> None:
    running = scene("mallory", max_update_norm=10.0, failure_policy="wait")
    running.send("mallory", 1_000.0)
    running.work()

    overdue(running)

    assert running.round.deadline is not None
    assert running.round.deadline > timezone.now()
    assert running.task("mallory").state == TaskState.CANCELLED  # nobody is asked twice
    update_refuse(update=update_of(running, "mallory"), user=running.actor)
    assert running.task("mallory").state == TaskState.OPEN  # refused: asked again, after a pause
    assert running.task("mallory").attempt == 2


def test_at_deadline_fail_names_what_is_in_quarantine() -> None:
    running = scene("ada", "mallory", max_update_norm=10.0, at_deadline="fail")
    running.send("ada", 1.0)
    running.send("mallory", 1_000.0)
    running.work()
    overdue(running)

    assert running.now.reason.startswith("DEADLINE_MISSED: 0 of 2")
    assert "1 updates are in quarantine" in running.now.reason


def test_the_update_of_a_removed_site_is_not_waited_for() -> None:
    running = scene("ada", "mallory", max_update_norm=10.0)
    running.send("ada", 1.0)
    running.send("mallory", 1_000.0)
    running.work()

    training_clients_remove(
        training=running.now, user=running.actor, clients=[running.sites["mallory"].pk]
    )

    assert running.round.phase == RoundPhase.AGGREGATING


def test_the_same_update_again_is_still_the_same_and_another_is_refused() -> None:
    running = scene("ada", "mallory", max_update_norm=10.0)
    first = running.send("mallory", 1_000.0)
    running.work()

    again = running.send("mallory", 1_000.0)

    assert (again.created, again.update.pk) == (False, first.update.pk)
    assert again.update.state == "quarantined"
    with pytest.raises(RoundClosed) as refusal:
        running.send("mallory", 1.0)
    assert refusal.value.error_code == "TASK_CLOSED"


# --- another update after a refused one -------------------------------------------------------


def test_who_is_refused_may_send_another_update_as_often_as_the_policy_says() -> None:
    running = scene("ada", "mallory", max_update_norm=10.0, bad_updates="refuse", refused_retries=1)
    running.send("ada", 1.0)
    running.send("mallory", 1_000.0)
    running.work()

    part = running.task("mallory")
    assert (part.state, part.attempt) == (TaskState.OPEN, 2)
    assert part.failure.startswith("UPDATE_REFUSED: NORM")  # why he is asked again
    running.send("mallory", 3.0)
    close(running)
    running.work()

    assert np.allclose(running.current()["layer.bias"], 2.0)
    sent = LocalModel.objects.filter(owner=running.sites["mallory"])
    assert sorted(sent.values_list("state", flat=True)) == ["consumed", "refused"]


def test_the_refused_update_again_from_who_was_asked_again_ends_that_attempt_only() -> None:
    running = scene("ada", "mallory", max_update_norm=10.0, bad_updates="refuse", refused_retries=2)
    running.send("ada", 1.0)
    first = running.send("mallory", 1_000.0)
    running.work()

    attempts = []
    for _ in range(2):
        task_next(user=running.sites["mallory"])
        again = running.send("mallory", 1_000.0)
        attempts.append((running.task("mallory").state, running.task("mallory").attempt))

    assert (again.created, again.update.pk) == (False, first.update.pk)
    assert attempts == [(TaskState.OPEN, 3), (TaskState.FAILED, 3)]
    assert running.round.phase == RoundPhase.AGGREGATING


def test_a_refused_update_sent_again_before_its_site_was_asked_again_uses_up_no_attempt() -> None:
    running = scene("ada", "mallory", max_update_norm=10.0, bad_updates="refuse", refused_retries=1)
    running.send("ada", 1.0)
    running.send("mallory", 1_000.0)
    running.work()

    again = running.send("mallory", 1_000.0)  # the answer to the first was lost

    assert (again.created, again.update.state) == (False, "refused")
    assert (running.task("mallory").state, running.task("mallory").attempt) == (TaskState.OPEN, 2)


def test_a_retry_asks_those_again_whose_update_was_refused() -> None:
    running = scene("mallory", max_update_norm=10.0, bad_updates="refuse")
    running.send("mallory", 1_000.0)
    running.work()
    assert running.now.state == TrainingState.ERROR

    training_retry(training=running.now, user=running.actor)
    running.send("mallory", 2.0)
    close(running)
    running.work()

    assert np.allclose(running.current()["layer.bias"], 2.0)


def test_who_was_taken_out_is_not_asked_again() -> None:
    running = scene("ada", "mallory", max_update_norm=10.0, refused_retries=1)
    running.send("ada", 1.0)
    running.send("mallory", 1_000.0)
    running.work()
    training_clients_remove(
        training=running.now, user=running.actor, clients=[running.sites["mallory"].pk]
    )

    update_refuse(update=update_of(running, "mallory"), user=running.actor)

    assert running.task("mallory").state == TaskState.FAILED
    assert running.round.phase == RoundPhase.AGGREGATING


# --- pauses and retries -----------------------------------------------------------------------


def test_what_arrives_in_a_pause_is_looked_at_after_it() -> None:
    running = scene("ada", "mallory", max_update_norm=10.0)
    running.send("ada", 1.0)
    training_pause(training=running.now, user=running.actor)
    running.work()
    running.send("mallory", 1_000.0)
    assert states(running) == {"ada": "received", "mallory": "received"}

    TrainerEvent.objects.update(lease_until=None)  # the worker looks again at once
    training_resume(training=running.now, user=running.actor)
    close(running)

    assert states(running) == {"ada": "accepted", "mallory": "quarantined"}


def test_a_look_that_was_given_up_is_taken_again_by_a_retry() -> None:
    running = scene("ada", max_update_norm=10.0)
    running.send("ada", 1.0)
    event_give_up(event=TrainerEvent.objects.get(), reason="WORKER_LOST: for a test")
    assert running.now.state == TrainingState.ERROR

    training_retry(training=running.now, user=running.actor)
    close(running)
    running.work()

    assert np.allclose(running.current()["layer.bias"], 1.0)


# --- updates that need no look ----------------------------------------------------------------


def test_without_these_options_updates_are_accepted_in_the_request() -> None:
    running = scene()
    running.send("ada", 1_000.0)

    assert states(running) == {"ada": "accepted"}
    assert not TrainerEvent.objects.exists()


# --- outliers ---------------------------------------------------------------------------------


def test_who_goes_the_other_way_is_quarantined_once_the_round_could_close() -> None:
    running = scene("ada", "grace", "mallory", "zoe", min_update_cosine=0.0)
    for site, value in (("ada", 1.0), ("grace", 2.0), ("mallory", -5.0)):
        running.send(site, value)

    assert running.work() == 0  # more may come
    running.send("zoe", 3.0)
    close(running)
    overdue(running)
    running.work()

    assert states(running)["mallory"] == "quarantined"
    assert update_of(running, "mallory").reason.startswith("COSINE: ")
    assert np.allclose(running.current()["layer.bias"], 2.0)


def test_at_a_deadline_those_that_are_there_are_compared() -> None:
    running = scene("ada", "grace", "mallory", "zoe", min_update_cosine=0.0)
    for site, value in (("ada", 1.0), ("grace", 2.0), ("mallory", -5.0)):
        running.send(site, value)
    overdue(running)
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
    overdue(running)

    with pytest.raises(RoundClosed, match="has gone on without this update"):
        update_release(update=update_of(running, "mallory"), user=running.actor)

    assert states(running)["mallory"] == "quarantined"


def test_a_failed_round_counts_it_after_release_and_retry() -> None:
    running = scene("mallory", max_update_norm=10.0)
    running.send("mallory", 1_000.0)
    running.work()
    overdue(running)
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


def test_what_is_in_quarantine_when_its_round_is_over_is_refused() -> None:
    running = scene("ada", "mallory", max_update_norm=10.0)
    running.send("ada", 1.0)
    running.send("mallory", 1_000.0)
    close(running)
    overdue(running)
    assert states(running)["mallory"] == "quarantined"  # the round may fail, and be retried
    running.work()
    assert running.now.model.round == 1

    sweep()

    kept = update_of(running, "mallory")
    assert (kept.state, kept.blob) == ("refused", None)
    assert kept.reason.startswith("NOT_DECIDED")
    assert "was: NORM" in kept.reason


def test_refusing_the_last_one_waited_for_lets_the_round_go_on() -> None:
    running = scene("ada", "mallory", max_update_norm=10.0)
    running.send("ada", 1.0)
    running.send("mallory", 1_000.0)
    running.work()
    assert running.round.phase == RoundPhase.COLLECTING

    update_refuse(update=update_of(running, "mallory"), user=running.actor)

    assert running.round.phase == RoundPhase.AGGREGATING


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
    update_release(update=update_of(running, "mallory"), user=running.actor)
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
        match float(bias.max()):
            case 99.0:
                return {"layer.bias": bias}
            case 98.0:
                raise ZeroDivisionError("on purpose")
            case 97.0:
                while True:
                    try:
                        time.sleep(1)
                    except Exception:  # noqa: S112, BLE001 - as careless as can be
                        continue
            case 96.0:
                return "fine"  # type: ignore[return-value]
            case 95.0:
                return {n: t.double() if n != "steps" else t for n, t in tensors.items()}
            case 94.0:
                return {n: t / 0.0 if n != "steps" else t for n, t in tensors.items()}
            case 93.0:
                raise OSError(errno.ENOSPC, "No space left on device")
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


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (99.0, "CHECK_FAILED: Careful.check gave back other tensors than it got"),
        (98.0, "CHECK_FAILED: Careful.check raised ZeroDivisionError"),
        (97.0, "CHECK_TIMEOUT: Careful.check took more than 0.2 s"),
        (96.0, "CHECK_FAILED: Careful.check gave back a str"),
        (95.0, "CHECK_FAILED: Careful.check changed the shape or dtype of tensor 'layer.bias'"),
        (94.0, "CHECK_FAILED: Careful.check gave back: "),
    ],
)
def test_a_check_that_comes_to_nothing_is_a_verdict_by_policy(
    careful, settings, value, said
) -> None:
    settings.FL_CHECK_SECONDS = 0.2
    running = scene("ada", method="Careful")
    running.send("ada", value)
    running.work()

    update = update_of(running, "ada")
    assert (update.state, update.reason[: len(said)]) == ("quarantined", said)
    update_release(update=update, user=running.actor)
    running.work()
    assert np.allclose(running.current()["layer.bias"], value)  # nobody's work is lost


def test_a_check_that_hangs_outside_of_python_ends_its_process() -> None:
    program = """
import ctypes
from fl_server_ai.trainer.time_limit import time_limited
lock, mutex = ctypes.PyDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(128)
with time_limited(0.1):
    for _ in range(2):  # the second one waits for itself, with Python's own lock in its hands
        lock(mutex)
"""

    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60)

    assert ended.returncode == 1
    assert b"Timeout" in ended.stderr


def test_a_full_disk_is_no_verdict_and_the_look_is_tried_again(careful) -> None:
    running = scene("ada", method="Careful")
    running.send("ada", 93.0)
    running.work()

    assert states(running) == {"ada": "received"}
    event = TrainerEvent.objects.get()
    assert (event.state, event.failures) == ("pending", 0)
    assert "No space left" in event.error


# --- options ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "pointer"),
    [
        ({"max_update_norm": 0.0}, "/options/max_update_norm"),
        ({"min_update_cosine": 2.0}, "/options/min_update_cosine"),
        ({"max_update_norm": 1.0, "late_updates": "next_round"}, "/options/late_updates"),
        ({"max_update_norm": 1.0, "mode": "buffered", "buffer_size": 2}, "/options/mode"),
        ({"min_update_cosine": 0.1, "daisy_chain_period": 2}, "/options/min_update_cosine"),
        ({"max_update_norm": 1.0, "method": "FedSGD"}, "/options/max_update_norm"),
    ],
)
def test_what_cannot_be_checked_is_refused_with_a_pointer(options, pointer) -> None:
    with pytest.raises(Invalid) as refusal:
        scene(started=False, **options)

    assert refusal.value.data["errors"][0]["pointer"] == pointer


# --- what sites remember ----------------------------------------------------------------------


def own(running: Scene, site: str) -> dict[str, list[int]]:
    found: dict[str, list[int]] = task_next(user=running.sites[site])["task"]["own_updates"]
    return found


def test_the_next_task_says_which_own_updates_were_not_used() -> None:
    running = scene(
        "ada", "mallory", rounds=3, max_update_norm=10.0, skip_model_tests=True, refused_retries=1
    )
    assert own(running, "mallory") == {"unused": [], "undecided": []}
    running.send("ada", 1.0)
    running.send("mallory", 1_000.0)
    close(running)
    overdue(running)
    running.work()

    assert own(running, "mallory") == {"unused": [0], "undecided": []}  # before and after the sweep
    sweep()
    assert own(running, "mallory") == {"unused": [0], "undecided": []}
    assert own(running, "ada") == {"unused": [], "undecided": []}

    running.send("mallory", 900.0)
    running.work()
    update_refuse(
        update=LocalModel.objects.get(round=running.round, owner=running.sites["mallory"]),
        user=running.actor,
    )
    assert running.task("mallory").state == TaskState.OPEN  # asked again
    running.send("mallory", 1.0)
    running.send("ada", 1.0)
    close(running)
    running.work()

    assert own(running, "mallory") == {"unused": [0], "undecided": []}  # of 1 the second counted


def test_a_round_that_it_began_and_never_answered_is_named_and_one_that_it_never_saw_is_not(
    monkeypatch,
) -> None:
    running = scene("ada", "grace", rounds=5, skip_model_tests=True)
    for number in range(4):
        if number != 1:
            own(running, "grace")
        if number == 2:
            running.send("grace", 1.0)
        running.send("ada", 1.0)
        overdue(running)
        running.work()
    grace = running.sites["grace"]

    assert own(running, "grace") == {"unused": [0, 3], "undecided": []}  # of 2 the update counted
    assert own(running, "ada") == {"unused": [], "undecided": []}
    monkeypatch.setattr("fl_server_core.selectors.own_updates.TOLD", 1)
    assert own_updates(training=running.now, owner=grace.pk, before=4) == OwnUpdates([3], [])


def test_a_late_update_is_undecided_until_it_counts() -> None:
    running = scene(
        "ada", "grace", rounds=4, late_updates="next_round", skip_model_tests=True, buffer_size=1
    )
    running.send("ada", 1.0)
    running.send("grace", 1.0)  # too late for round 0
    grace = running.sites["grace"]

    assert own_updates(training=running.now, owner=grace.pk, before=4) == OwnUpdates([], [0])
    running.work()
    running.work()  # round 1, with what came late
    assert own_updates(training=running.now, owner=grace.pk, before=4) == OwnUpdates([], [])


def test_scaffolds_variates_add_up_although_an_update_was_refused(tmp_path) -> None:
    running = scene(
        "ada", "mallory", method="SCAFFOLD", rounds=3, max_update_norm=10.0, bad_updates="refuse",
        skip_model_tests=True,
    )  # fmt: skip
    ends = {"ada": [1.0, 2.0, 0.0], "mallory": [2.0, 1_000.0, 0.0]}  # its second one is refused

    for round in range(3):
        corrections = []
        for site in ("ada", "mallory"):
            task = task_next(user=running.sites[site])["task"]
            shared = running.now.model.weights.shared
            told = {}
            if shared is not None:
                with local_path(shared) as path:
                    told = load(path.read_bytes())
            context = fl_client.Context(
                task,
                lambda _: {},
                extras={
                    "scaffold.c": {n.removeprefix("extra.scaffold.c."): v for n, v in told.items()}
                },
                folder=tmp_path / site,
            )
            start = running.current()
            scaffold = fl_client.Scaffold(context, start)
            end = weights(ends[site][round])
            change = scaffold.finish(start, end, 1.0)
            corrections.append(scaffold.correction["layer.bias"])
            update_submit(
                model_id=running.training.model_id,
                owner=running.sites[site],
                round=round,
                sample_size=1,
                file=staged(save(end | {f"extra.scaffold.dc.{n}": v for n, v in change.items()})),
                sha256=None,
                metrics={},
            )
        close(running)
        running.work()

        assert np.allclose(sum(corrections), 0.0)  # c is the mean of all c_k


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


def test_an_admin_releases_and_refuses_once_it_is_confirmed(client) -> None:
    running = scene("ada", "mallory", "eve", max_update_norm=10.0)
    running.send("mallory", 1_000.0)
    running.send("eve", 1_000.0)
    running.work()
    client.force_login(person("root", is_superuser=True, is_staff=True))

    for site, action in (("mallory", "release"), ("eve", "refuse")):
        update = update_of(running, site)
        page = f"/admin/fl_server_core/localmodel/{update.pk}/"
        assert f"{page}{action}/" in client.get(f"{page}change/").content.decode()
        assert "NORM: |update - base|" in client.get(f"{page}{action}/").content.decode()
        assert states(running)[site] == "quarantined"
        client.post(f"{page}{action}/", {"confirmed": "yes"})
        assert f"{page}{action}/" not in client.get(f"{page}change/").content.decode()

    assert states(running) == {"mallory": "accepted", "eve": "refused"}


def test_an_admin_decides_on_several_at_once_and_is_asked_first(client) -> None:
    running = scene("ada", "mallory", "eve", max_update_norm=10.0)
    for site in ("ada", "mallory", "eve"):
        running.send(site, 1.0 if site == "ada" else 1_000.0)
    running.work()
    client.force_login(person("root", is_superuser=True, is_staff=True))
    every = [str(update.pk) for update in LocalModel.objects.all()]
    form = {"action": "release", "_selected_action": every}
    lists = "/admin/fl_server_core/localmodel/"

    asked = client.post(lists, form).content.decode()
    before = states(running)
    client.post(lists, {**form, "confirmed": "yes"})

    assert "It counts like any other update" in asked
    assert before == {"ada": "accepted", "mallory": "quarantined", "eve": "quarantined"}
    assert states(running) == {"ada": "accepted", "mallory": "accepted", "eve": "accepted"}
    assert running.round.phase == RoundPhase.AGGREGATING
