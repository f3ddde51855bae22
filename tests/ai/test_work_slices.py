"""A round that several workers share, from the rows' side: planned, claimed, killed, joined, published once."""

from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from django.core.files.storage import storages
from django.utils import timezone

from fl_server_ai.services import crowd
from fl_server_ai.services.controls import training_cancel, training_pause, training_resume
from fl_server_ai.services.reconciler import sweep
from fl_server_ai.trainer import slicing
from fl_server_ai.trainer.tasks import process_slice, process_trainer_task
from fl_server_core import killpoints
from fl_server_core.exceptions import AggregationException
from fl_server_core.models import Blob, TrainerEvent, WorkSlice
from fl_server_core.services.blocked import blocked_on
from fl_server_core.services.events import claimable
from fl_server_core.services.slices import slice_claim
from fl_server_core.storage import weights_storage
from tests.scenes import Scene, scene
from tests.system.faults.traps import Traps

pytestmark = pytest.mark.django_db
SITES = ("ada", "grace", "edsger", "tony", "barbara")


@pytest.fixture(autouse=True)
def two_workers(settings: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings.FL_SHARED_ROUND_BYTES = 1
    settings.FL_STAGING_DIR = tmp_path / "staging"
    weights = {
        "BACKEND": "fl_server_core.storage.DurableStorage",
        "OPTIONS": {"location": tmp_path / "weights"},
    }
    settings.STORAGES = {**settings.STORAGES, "weights": weights}
    monkeypatch.setattr(slicing, "aggregation_workers", lambda: 2)


def complete(running: Scene) -> TrainerEvent:
    for index, site in enumerate(running.sites):
        running.send(site, 1.0 + index**3 / 64, samples=index + 1)  # no two distances alike
    return TrainerEvent.objects.get(round=running.round, type="TrainingRoundFinished")


def ready(
    method: str = "FedAvgM", rounds: int = 3, sites: int = 2, **options: Any
) -> tuple[Scene, TrainerEvent]:
    running = scene(*SITES[:sites], method=method, rounds=rounds, skip_model_tests=True, **options)
    return running, complete(running)


def work(made: Counter[tuple[str, int]] | None = None, *, most: int = 100) -> None:
    """What workers do until nothing is left to do at once: events, and one slice after the other."""
    for _ in range(most):
        events = TrainerEvent.objects.filter(claimable())
        slices = WorkSlice.objects.filter(claimable()).order_by("pk")
        one = slices.first()
        if one is not None:
            if made is not None:
                made[one.kind, one.index] += 1
            process_slice(one.pk)
        elif (event := events.first()) is not None:
            process_trainer_task(event.pk)
        else:
            return


def expire() -> None:
    """The leases and pauses of all are over."""
    past = timezone.now() - timedelta(seconds=1)
    WorkSlice.objects.exclude(lease_until=None).update(lease_until=past)
    TrainerEvent.objects.exclude(lease_until=None).update(lease_until=past)


def files() -> set[str]:
    root = Path(weights_storage().location)
    return {str(path.relative_to(root)) for path in root.glob("*/*")}


@pytest.mark.parametrize("method", ["FedAvgM", "MultiKrum", "AdaptiveZeroing"])
def test_a_shared_round_publishes_the_bytes_of_one_worker(method: str, settings: Any) -> None:
    settings.FL_SHARED_ROUND_BYTES = 0
    options = {"f": 1} if method == "MultiKrum" else {}
    alone, _ = ready(method, sites=5, **options)
    alone.work()
    complete(alone)
    alone.work()
    expected = alone.digest(), alone.now.model.weights.scalars
    settings.FL_SHARED_ROUND_BYTES = 1
    for user in (alone.actor, *alone.sites.values()):
        user.username += " before"
        user.save()
    shared, _ = ready(method, sites=5, **options)
    made: Counter[tuple[str, int]] = Counter()

    work(made)
    complete(shared)
    work(made)

    assert (shared.digest(), shared.now.model.weights.scalars) == expected
    surveys = 0 if method == "FedAvgM" else 4
    assert sorted(made) == [("columns", k) for k in range(4)] + [
        ("survey", k) for k in range(surveys)
    ]
    assert set(made.values()) == {2}
    assert shared.now.model.round == 2
    assert not WorkSlice.objects.exists()
    assert files() == set(Blob.objects.values_list("name", flat=True))


def test_the_event_waits_unclaimed_while_slices_are_made_and_the_last_one_wakes_it() -> None:
    running, event = ready()
    process_trainer_task(event.pk)

    assert WorkSlice.objects.filter(state="pending").count() == 4
    assert sweep().dispatched == 0
    for number, one in enumerate(WorkSlice.objects.order_by("-pk")):
        told = blocked_on(training=running.now, visible_to=running.actor)
        assert told is not None
        assert told.code == "WORKER_QUEUED"
        assert f"{number} of 4 slices are made" in told.text
        assert running.now.model.round == 0
        process_slice(one.pk)
    event.refresh_from_db()
    assert (event.state, event.lease_until, event.failures) == ("pending", None, 0)
    assert sweep().dispatched == 1
    process_trainer_task(event.pk)

    assert running.now.model.round == 1


POINTS = [
    "slices.plan.commit:before", "slices.plan.commit:after", "hint.slices:before", "hint.slices:after",
    "slice.claim:before", "slice.claim:after", "slice.written", "file.rename:before", "file.rename:after",
    "slice.finish.commit:before", "slice.finish.commit:after", "hint.event:before",
    "aggregation.written", "round.publish.commit:before", "round.publish.commit:after",
]  # fmt: skip


class Killed(BaseException):
    """Nobody catches it, as nobody survives a kill."""


def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How often the columns of each slice are worked out."""
    made: Counter[int] = Counter()
    real = slicing._write

    def write(one: WorkSlice, *rest: Any) -> Any:
        made[one.index] += 1
        return real(one, *rest)

    monkeypatch.setattr(slicing, "_write", write)
    return made


@pytest.mark.django_db(transaction=True)
def test_a_kill_at_any_point_costs_its_slice_alone(
    settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(_: Path) -> None:
        raise Killed

    monkeypatch.setattr(killpoints, "_die", die)
    made = counted(monkeypatch)
    running, _ = ready("FedAvg", rounds=len(POINTS) + 2)
    work()
    undisturbed = running.digest()
    for number, point in enumerate(POINTS):
        complete(running)
        traps = Traps(tmp_path / str(number))
        monkeypatch.setattr(killpoints, "_book", None)
        traps.arm(point, passes=1 if point.startswith(("slice.", "file.")) else 0)
        settings.FL_KILL_POINTS = traps.folder
        made.clear()
        with pytest.raises(Killed):
            work()
        expire()
        settings.FL_KILL_POINTS = None
        sweep()
        work()

        assert running.now.model.round == number + 2, point
        assert running.digest() == undisturbed
        assert sorted(made.values()) in ([1, 1, 1, 1], [1, 1, 1, 2]), point
        assert not WorkSlice.objects.exists()
    assert set(Blob.objects.values_list("name", flat=True)) <= files()


def test_of_two_workers_with_the_same_slice_one_makes_it() -> None:
    running, event = ready()
    process_trainer_task(event.pk)
    first = WorkSlice.objects.order_by("pk").first()
    assert first is not None
    slow = slice_claim(slice_id=first.pk)
    assert slow is not None

    process_slice(first.pk)
    assert WorkSlice.objects.get(pk=first.pk).attempt == 1
    expire()
    process_slice(first.pk)
    made = WorkSlice.objects.get(pk=first.pk)
    slicing._make(slow, running.now, running.round)  # the first one is back, too late

    after = WorkSlice.objects.get(pk=first.pk)
    assert (after.state, after.attempt, after.result_id) == ("done", 2, made.result_id)
    assert len(files()) == Blob.objects.count()


def fails(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(one: WorkSlice, *rest: Any) -> Any:
        if one.index == 1:
            raise error
        return real(one, *rest)

    real = slicing._write
    monkeypatch.setattr(slicing, "_write", fail)


def test_a_slice_that_fails_three_times_ends_the_training_with_its_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fails(RuntimeError("a bad chip"), monkeypatch)
    running, event = ready()

    for _ in range(4):
        work()
        expire()
        sweep()

    assert running.now.state == "E"
    reason = running.now.reason
    assert reason.startswith("WORKER_LOST: TrainingRoundFinished, columns 2 of 4, 3 attempts")
    assert "a bad chip" in reason
    assert not WorkSlice.objects.exists()
    event.refresh_from_db()
    assert event.state == "failed"


def test_three_lost_workers_of_a_slice_end_the_training() -> None:
    running, event = ready()
    process_trainer_task(event.pk)
    one = WorkSlice.objects.order_by("pk").first()
    assert one is not None
    for _ in range(3):
        assert slice_claim(slice_id=one.pk) is not None
        expire()

    sweep()

    assert running.now.state == "E"
    assert "killed, or out of memory" in running.now.reason


def test_what_cannot_be_combined_ends_the_training_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fails(AggregationException("NaN in 'a'"), monkeypatch)
    running, _ = ready()

    work()

    assert (running.now.state, running.round.phase) == ("E", "failed")
    assert running.now.reason.startswith("AGGREGATION_FAILED: NaN in 'a'")
    assert not WorkSlice.objects.exists()


def test_a_damaged_slice_is_made_again_before_anything_is_published(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = counted(monkeypatch)
    running, event = ready()
    process_trainer_task(event.pk)
    for one in WorkSlice.objects.all():
        process_slice(one.pk)
    second = WorkSlice.objects.select_related("result").get(index=2)
    assert second.result is not None
    path = Path(weights_storage().path(second.result.name))
    path.write_bytes(bytes(path.stat().st_size))

    work()

    assert running.now.model.round == 1
    assert made == {0: 1, 1: 1, 2: 2, 3: 1}


@pytest.mark.parametrize("kind", ["survey", "columns"])
def test_a_slice_whose_file_is_gone_is_made_again(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: Counter[tuple[str, int]] = Counter()
    running, _ = ready("Krum", sites=5, f=1)
    while WorkSlice.objects.filter(kind=kind, state="done").count() < 4:
        work(made, most=1)
    one = WorkSlice.objects.select_related("result").get(kind=kind, index=2)
    assert one.result is not None
    Path(weights_storage().path(one.result.name)).unlink()

    for _ in range(3):
        work(made)
        expire()

    assert running.now.model.round == 1
    assert made.pop((kind, 2)) == 2
    assert not Blob.objects.filter(name__endswith=".slice", doomed_at=None).exists()


def test_a_worker_that_comes_late_leaves_what_has_been_planned_since() -> None:
    running, event = ready()
    process_trainer_task(event.pk)
    first = WorkSlice.objects.order_by("pk").first()
    assert first is not None
    slow = slice_claim(slice_id=first.pk)
    assert slow is not None
    slow.plan = "of another day"
    late = TrainerEvent.objects.get(pk=event.pk)

    assert not slicing._make(slow, running.now, running.round)
    slicing._drop(late)  # which it does not hold

    assert WorkSlice.objects.count() == 4


def test_there_are_as_many_slices_as_wanted_however_few_shares_of_a_comparison(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(slicing, "aggregation_workers", lambda: 6)
    running, _ = ready("Krum", sites=5, f=1)
    made: Counter[tuple[str, int]] = Counter()

    work(made)

    assert Counter(kind for kind, _ in made) == {"survey": 8, "columns": 12}
    assert running.now.model.round == 1


def test_a_round_that_is_shared_stays_so_when_the_other_workers_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    running, event = ready("Krum", sites=5, f=1)
    process_trainer_task(event.pk)
    monkeypatch.setattr(slicing, "aggregation_workers", lambda: 1)
    made: Counter[tuple[str, int]] = Counter()

    work(made)

    assert Counter(kind for kind, _ in made) == {"survey": 4, "columns": 4}
    assert running.now.model.round == 1


def test_slices_of_other_inputs_are_made_anew() -> None:
    running, event = ready()
    process_trainer_task(event.pk)
    WorkSlice.objects.update(plan="of another day")

    work()

    assert running.now.model.round == 1


def test_a_pause_holds_slices_and_a_cancel_drops_them() -> None:
    running, event = ready()
    process_trainer_task(event.pk)
    one, *others = WorkSlice.objects.order_by("pk")
    process_slice(one.pk)
    training_pause(training=running.training, user=running.actor)

    process_slice(others[0].pk)
    sweep()
    assert WorkSlice.objects.filter(state="done").count() == 1
    training_resume(training=running.training, user=running.actor)
    expire()
    process_slice(others[0].pk)
    assert WorkSlice.objects.filter(state="done").count() == 2
    training_cancel(training=running.training, user=running.actor)
    sweep()

    assert not WorkSlice.objects.exists()
    assert not [name for name in files() if name.endswith(".slice")]


@pytest.mark.parametrize(("size", "workers", "slices"), [(10**9, 8, 0), (1, 1, 0), (1, 3, 6)])
def test_a_round_is_shared_when_it_is_large_and_somebody_is_there(
    size: int, workers: int, slices: int, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.FL_SHARED_ROUND_BYTES = size
    monkeypatch.setattr(slicing, "aggregation_workers", lambda: workers)
    running, event = ready()

    process_trainer_task(event.pk)

    assert WorkSlice.objects.count() == slices
    assert running.now.model.round == (0 if slices else 1)


def test_without_celery_there_is_one_worker() -> None:
    assert crowd.aggregation_workers() == 1


def test_slices_come_to_the_same_on_a_storage_without_paths(settings: Any) -> None:
    settings.STORAGES = {
        **settings.STORAGES,
        "weights": {"BACKEND": "django.core.files.storage.InMemoryStorage"},
    }
    assert not hasattr(storages["weights"], "adopt")
    running, _ = ready("Krum", sites=5, f=1)

    work()

    assert running.now.model.round == 1
    assert running.current()["steps"] is not None
    assert not list(Path(settings.FL_STAGING_DIR).glob("*.copy"))
