from collections.abc import Callable

import pytest
from django.db import IntegrityError, transaction

from fl_server_core.models import (
    LocalModel,
    Metric,
    ModelVersion,
    Notification,
    Participant,
    Round,
    Task,
    TrainerEvent,
)
from tests.scenes import Scene, scene

pytestmark = pytest.mark.django_db


def _copy(row):
    row.pk = None
    row._state.adding = True
    if hasattr(row, "delivery_id"):
        row.delivery_id = Notification._meta.get_field("delivery_id").get_default()
    row.save(force_insert=True)


def _metric(s: Scene, **fields) -> Metric:
    values = {"model": s.training.model, "key": "loss", "step": 1, "value_float": 1.0, **fields}
    return Metric.objects.create(**values)


TWICE: dict[str, Callable[[Scene], object]] = {
    "participant": lambda s: _copy(Participant.objects.first()),
    "round": lambda s: _copy(Round.objects.first()),
    "task": lambda s: _copy(Task.objects.first()),
    "update": lambda s: _copy(LocalModel.objects.first()),
    "version": lambda s: _copy(ModelVersion.objects.first()),
    "event": lambda s: [
        TrainerEvent.objects.create(training=s.training, round=s.round, type="T") for _ in "12"
    ],
    "notification": lambda s: _copy(Notification.objects.first()),
    "metric of a reporter": lambda s: [_metric(s, reporter=s.actor) for _ in "12"],
    "metric of the server": lambda s: [_metric(s) for _ in "12"],
    "metric of an update": lambda s: [
        _metric(s, local_model=LocalModel.objects.first()) for _ in "12"
    ],
    "metric without a value": lambda s: _metric(s, value_float=None),
    "metric with two values": lambda s: _metric(s, value_binary=b"x"),
    "update without samples": lambda s: LocalModel.objects.update(sample_size=0),
    "training without rounds": lambda s: type(s.training).objects.update(target_num_updates=0),
    "training in no known state": lambda s: type(s.training).objects.update(state="?"),
    "round in no known phase": lambda s: Round.objects.update(phase="?"),
}


@pytest.mark.parametrize("what", TWICE)
def test_the_database_itself_refuses(what: str) -> None:
    running = scene(endpoint="https://site.example/hook")
    running.send("ada", 1.0)

    with pytest.raises(IntegrityError), transaction.atomic():
        TWICE[what](running)
