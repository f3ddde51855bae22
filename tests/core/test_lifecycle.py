import pytest

from fl_server_core.exceptions import IllegalMove
from fl_server_core.lifecycle import MOVES, TaskState, TrainingState, move
from fl_server_core.models import Training
from tests.scenes import scene

pytestmark = pytest.mark.django_db
ALL = [(kind, state) for kind in MOVES for state in kind]


@pytest.mark.parametrize(("kind", "state"), ALL, ids=lambda value: str(value))
def test_every_state_has_its_moves_and_they_lead_to_states(kind, state) -> None:
    assert MOVES[kind][state] <= set(kind.values)
    assert state not in MOVES[kind][state]


@pytest.mark.parametrize("to", list(TrainingState))
def test_a_training_moves_only_where_the_table_says(to) -> None:
    training = scene(started=False).training

    if to in MOVES[TrainingState][TrainingState.INITIAL]:
        move(training, to)
        assert Training.objects.get().state == to
    else:
        with pytest.raises(IllegalMove) as refusal:
            move(training, to)
        assert refusal.value.data == {"state": "I"}
        assert Training.objects.get().state == "I"


def test_of_two_that_race_the_second_learns_what_it_lost_to() -> None:
    training = scene().training
    first, second = Training.objects.get(pk=training.pk), Training.objects.get(pk=training.pk)
    move(first, TrainingState.PAUSED)

    with pytest.raises(IllegalMove) as refusal:
        move(second, TrainingState.COMPLETED)

    assert refusal.value.data == {"state": "P"}
    assert Training.objects.get().state == "P"


def test_fields_are_written_with_the_state() -> None:
    task = scene().task("ada")

    move(task, TaskState.FAILED, failure="X: why")

    task.refresh_from_db()
    assert (task.state, task.failure) == ("failed", "X: why")
