"""An error is not always a rollback: what was committed keeps its file, what was not leaves none."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings
from django.db import OperationalError, connection

from fl_server_ai import dispatch
from fl_server_ai.services.reconciler import sweep
from fl_server_ai.trainer import publishing
from fl_server_ai.trainer.tasks import process_trainer_task
from fl_server_core.models import Blob, LocalModel, ModelVersion, TrainerEvent
from fl_server_core.storage import weights_storage
from tests.scenes import Scene, scene

pytestmark = pytest.mark.django_db(transaction=True)


@contextmanager
def answers_of_commits_lost(when: Callable[[], bool]) -> Iterator[None]:
    """As when the connection breaks after COMMIT has been sent: it happened, and the server said so to nobody."""
    real = connection.commit

    def commit() -> None:
        real()
        if when():
            raise OperationalError("server closed the connection unexpectedly")

    connection.commit = commit
    try:
        yield
    finally:
        connection.commit = real


def files() -> set[str]:
    folder = Path(settings.FL_DATA_DIR) / "weights"
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def all_there() -> bool:
    return all(weights_storage().exists(blob.name) for blob in Blob.objects.all())


def test_an_update_whose_commit_was_not_confirmed_keeps_its_file() -> None:
    running = scene()

    with (
        answers_of_commits_lost(lambda: LocalModel.objects.exists()),
        pytest.raises(OperationalError),
    ):
        running.send("ada", 1.0)

    assert LocalModel.objects.get().state == "accepted"
    assert all_there()
    again = running.send("ada", 1.0)
    assert not again.created


def test_a_result_whose_commit_was_not_confirmed_is_kept_and_the_training_goes_on() -> None:
    running = complete(scene(skip_model_tests=True))

    with answers_of_commits_lost(lambda: ModelVersion.objects.filter(number=1).exists()):
        process_trainer_task(TrainerEvent.objects.get().pk)
    assert all_there()
    TrainerEvent.objects.update(lease_until=None)
    running.work()

    assert running.now.model.weights.number == 1
    assert running.round.number == 1
    assert all_there()


def complete(running: Scene) -> Scene:
    running.send("ada", 1.0)
    running.send("grace", 3.0)
    return running


def test_a_hint_that_raises_after_the_commit_undoes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(task: str, args: list[int]) -> None:
        raise RuntimeError("no broker")

    monkeypatch.setitem(dispatch._senders, settings.FL_EXECUTOR, broken)

    running = complete(scene(skip_model_tests=True))

    assert TrainerEvent.objects.get().state == "pending"
    assert all_there()
    running.work()
    assert running.now.model.round == 1


def test_what_was_rolled_back_leaves_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    running = scene()
    before = files()

    def fails(**_: Any) -> None:
        raise ValueError("in the middle of the transaction")

    monkeypatch.setattr("fl_server_ai.services.updates.round_advance", fails)
    with pytest.raises(ValueError, match="middle"):
        running.send("ada", 1.0)

    assert files() == before
    assert not LocalModel.objects.exists()


def test_a_full_disk_or_a_lost_database_costs_only_time(monkeypatch: pytest.MonkeyPatch) -> None:
    running = complete(scene(skip_model_tests=True))
    event = TrainerEvent.objects.get()
    real = publishing.aggregate
    failures: list[Exception] = [OSError(28, "No space left on device")] * 4
    failures += [OperationalError("the connection is gone")] * 4

    def aggregate(**arguments: Any) -> Any:
        if failures:
            raise failures.pop()
        return real(**arguments)

    monkeypatch.setattr(publishing, "aggregate", aggregate)
    for _ in range(9):
        TrainerEvent.objects.update(lease_until=None)
        sweep()
        process_trainer_task(event.pk)

    event.refresh_from_db()
    assert (event.state, event.attempt, event.failures) == ("done", 9, 0)
    assert running.now.model.round == 1
