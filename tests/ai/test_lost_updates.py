"""An accepted update whose file disappears or changes: noticed by digest, and the round handled by its policy."""

import os
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from django.utils import timezone

from fl_server_ai.aggregation.blocks import Source
from fl_server_ai.services.reconciler import sweep
from fl_server_ai.services.rounds import round_advance
from fl_server_ai.services.tasks import task_next
from fl_server_ai.trainer import intact, slicing
from fl_server_ai.trainer.tasks import process_slice, process_trainer_task
from fl_server_core.models import Blob, LocalModel, Round, TrainerEvent, WorkSlice
from fl_server_core.storage import weights_storage
from tests.ai.meddling import (
    a_moment_later,
    overwrite,
    overwrite_and_link,
    replace_by_rename,
)
from tests.scenes import Scene, scene

pytestmark = pytest.mark.django_db


def path_of(running: Scene, site: str) -> Path:
    update = LocalModel.objects.get(owner=running.sites[site], round=running.round)
    assert update.blob is not None
    return Path(weights_storage().path(update.blob.name))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


HARM = [Path.unlink, overwrite, cut, replace_by_rename]
SAID = {"unlink": "has disappeared", "cut": "bytes, not"}


def full(**options: Any) -> Scene:
    running = scene(skip_model_tests=True, **options)
    running.send("ada", 1.0, samples=1)
    running.send("grace", 3.0, samples=3)
    return running


@pytest.mark.parametrize("harm", HARM, ids=lambda harm: harm.__name__)
def test_its_owner_is_asked_again_and_the_round_ends_as_if_nothing_had_been(
    harm: Callable[[Path], None],
) -> None:
    running = full()
    harm(path_of(running, "grace"))

    running.work()

    task = running.task("grace")
    assert (running.round.phase, running.now.model.round) == ("collecting", 0)
    assert (task.state, task.attempt) == ("open", 2)
    assert task.failure.startswith("UPDATE_LOST")
    assert SAID.get(harm.__name__, "SHA-256") in task.failure
    assert LocalModel.objects.get().owner == running.sites["ada"]
    again = running.send("grace", 3.0, samples=3)
    assert again.created
    running.work()
    assert running.current()["layer.bias"].tolist() == [2.5] * 3
    assert "was lost" in Round.objects.get(number=0).warnings[0]


def end(running: Scene) -> None:
    """The round is as old as a round gets."""
    Round.objects.filter(pk=running.round.pk).update(
        started_at=timezone.now() - timedelta(seconds=90_000)
    )


def test_past_the_deadline_the_round_does_without_it_if_enough_are_left() -> None:
    running = full()
    path_of(running, "grace").unlink()
    end(running)

    running.work()
    running.work()

    assert running.now.model.round == 1
    assert running.current()["layer.bias"].tolist() == [1.0] * 3
    first = Round.objects.get(number=0)
    assert "was lost" in first.warnings[0]
    task = first.tasks.get(user=running.sites["grace"])
    assert (task.state, task.failure.partition(":")[0]) == ("failed", "UPDATE_LOST")


@pytest.mark.parametrize("asked_again", [False, True])
def test_its_owner_is_told_that_it_was_not_used(asked_again: bool) -> None:
    running = full()
    path_of(running, "grace").unlink()
    if asked_again:
        running.work()
        running.round.tasks.filter(state="open").update(state="expired")  # she stays silent
        round_advance(training_id=running.training.pk)
    end(running)
    running.work()
    running.work()

    told = {name: task_next(user=user)["task"] for name, user in running.sites.items()}

    assert told["grace"]["round"] == 1
    assert told["grace"]["own_updates"] == {"unused": [0], "undecided": []}
    assert told["ada"]["own_updates"] == {"unused": [], "undecided": []}


def test_past_the_deadline_with_too_few_left_the_training_fails_with_the_reason() -> None:
    running = full(min_updates=2)
    path_of(running, "grace").unlink()
    end(running)

    running.work()

    assert running.now.state == "E"
    assert running.now.reason.startswith("NOT_ENOUGH_UPDATES")
    assert "1 x UPDATE_LOST" in running.now.reason
    assert not TrainerEvent.objects.exists()


def test_with_the_policy_wait_it_is_asked_for_past_any_deadline() -> None:
    running = full(failure_policy="wait")
    path_of(running, "grace").unlink()
    end(running)

    running.work()

    assert running.task("grace").state == "open"
    assert running.round.deadline is not None
    assert running.round.deadline > timezone.now()


def test_all_that_were_lost_are_asked_for_at_once() -> None:
    running = full()
    for site in ("ada", "grace"):
        path_of(running, site).unlink()

    running.work()

    assert [running.task(site).state for site in ("ada", "grace")] == ["open", "open"]
    assert not Blob.objects.exclude(pk=running.now.model.weights.blob_id).filter(doomed_at=None)


def test_who_has_left_is_not_asked_again() -> None:
    running = full()
    path_of(running, "grace").unlink()
    running.training.memberships.filter(user=running.sites["grace"]).update(
        removed_at=timezone.now()
    )

    running.work()
    running.work()

    assert running.now.model.round == 1
    assert running.current()["layer.bias"].tolist() == [1.0] * 3


def test_the_last_buffer_waits_for_it_although_all_other_parts_have_ended() -> None:
    running = scene(
        "ada", "grace", "edsger", rounds=1, mode="buffered", buffer_size=2, skip_model_tests=True
    )
    running.send("ada", 1.0)
    running.send("grace", 3.0)
    path_of(running, "grace").unlink()

    running.work()
    assert running.round.phase == "collecting"
    running.send("grace", 3.0)
    running.work()

    assert running.now.state == "C"
    assert running.current()["layer.bias"].tolist() == [2.0] * 3


def test_a_late_update_that_is_lost_is_refused_where_it_was_trained() -> None:
    running = scene(
        "ada", "grace", rounds=3, late_updates="next_round", skip_model_tests=True, buffer_size=1
    )
    running.send("ada", 1.0)
    running.work()
    running.send("grace", 3.0, round=0)
    sweep()
    late = LocalModel.objects.get(owner=running.sites["grace"])
    assert late.trained_in is not None
    assert late.blob is not None
    Path(weights_storage().path(late.blob.name)).unlink()

    running.work()

    late.refresh_from_db()
    assert (late.state, late.round.number, late.blob) == ("refused", 0, None)
    assert late.reason.startswith("UPDATE_LOST")


def test_a_file_that_was_only_touched_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = []
    real = intact._digest
    monkeypatch.setattr(intact, "_digest", lambda path: hashed.append(path) or real(path))
    running = full()
    running.work()
    assert hashed == []  # nobody touched anything: no digest is taken
    running.send("ada", 1.0, samples=1)
    running.send("grace", 3.0, samples=3)
    touched = path_of(running, "grace")
    os.utime(touched, (0, 0))

    running.work()

    assert hashed == [touched]
    assert running.now.model.round == 2


def disturb(
    monkeypatch: pytest.MonkeyPatch,
    path: Path,
    harm: Callable[[Path], object],
    *,
    late: bool = True,
) -> None:
    """Something happens to a file once: after the first block is read, or before any file is opened."""

    def read_into(self: Source, target: memoryview, offset: int) -> None:
        real(self, target, offset)
        strike()

    def opened(self: Source, *args: Any, **more: Any) -> None:
        strike()
        init(self, *args, **more)

    def strike() -> None:
        monkeypatch.setattr(Source, "read_into", real)
        monkeypatch.setattr(Source, "__init__", init)
        if first.acquire(blocking=False):  # of all threads
            harm(path)

    real, init = Source.read_into, Source.__init__
    first = threading.Lock()
    a_moment_later(path)
    if late:
        monkeypatch.setattr(Source, "read_into", read_into)
    else:
        monkeypatch.setattr(Source, "__init__", opened)


@pytest.mark.parametrize(
    ("harm", "late"),
    [
        (overwrite, True),
        (overwrite_and_link, True),
        (replace_by_rename, True),
        (Path.unlink, True),
        (overwrite, False),
    ],
)
def test_a_change_while_it_is_read_is_decided_by_the_digest(
    harm: Callable[[Path], object], late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = full()
    disturb(monkeypatch, path_of(running, "grace"), harm, late=late)

    running.work()

    assert running.task("grace").state == "open"
    said = "has disappeared" if harm == Path.unlink else "SHA-256"
    assert said in running.task("grace").failure


@pytest.mark.parametrize("whose", ["grace's", "the model's"])
def test_a_touch_while_it_is_read_costs_an_attempt(
    whose: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = full()
    own = Path(weights_storage().path(running.now.model.weights.blob.name))
    disturb(monkeypatch, path_of(running, "grace") if whose == "grace's" else own, os.utime)

    running.work()

    event = TrainerEvent.objects.get()
    assert (event.state, event.failures) == ("pending", 1)
    assert "written to" in event.error
    TrainerEvent.objects.update(lease_until=None)
    running.work()
    assert running.now.model.round == 1


@pytest.mark.parametrize("late", [None, False, True], ids=["before", "between", "during"])
def test_a_model_whose_own_file_is_damaged_ends_the_training_with_what_to_do(
    late: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = full()
    own = Path(weights_storage().path(running.now.model.weights.blob.name))
    if late is None:
        overwrite(own)
    else:
        disturb(monkeypatch, own, overwrite, late=late)

    running.work()

    assert running.now.state == "E"
    assert "restore the weights from a backup" in running.now.reason


@pytest.mark.parametrize("planned", [False, True])
def test_a_shared_round_notices_before_and_while_slices_are_made(
    planned: bool, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.FL_SHARED_ROUND_BYTES = 1
    monkeypatch.setattr(slicing, "aggregation_workers", lambda: 2)
    running = full()
    event = TrainerEvent.objects.get()
    if planned:
        process_trainer_task(event.pk)
        first, *others = WorkSlice.objects.order_by("pk")
        process_slice(first.pk)
    path_of(running, "grace").unlink()

    if planned:
        process_slice(others[0].pk)
    else:
        process_trainer_task(event.pk)

    assert (running.task("grace").state, running.round.phase) == ("open", "collecting")
    assert not WorkSlice.objects.exists()
    assert not TrainerEvent.objects.exists()
    running.send("grace", 3.0, samples=3)
    running.work()
    for one in WorkSlice.objects.order_by("pk"):
        process_slice(one.pk)
    running.work()
    assert running.current()["layer.bias"].tolist() == [2.5] * 3
