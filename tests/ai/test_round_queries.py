"""What a round asks of the database does not grow with the number of its clients."""

from collections.abc import Callable
from typing import Any

import pytest
from django.db import connection
from django.db.models import Value
from django.db.models.functions import Concat
from django.test.utils import CaptureQueriesContext

from fl_server_ai.services.tasks import task_next
from fl_server_core.models import Task, User
from tests.scenes import scene

pytestmark = pytest.mark.django_db


def counted(act: Callable[[], Any]) -> int:
    with CaptureQueriesContext(connection) as queries:
        act()
    return len(queries)


def costs(clients: int, sampled: int, prefix: str) -> dict[str, int]:
    """Queries by step, of a second round: in the first one, some things happen once."""
    names = [f"{prefix}{n:03}" for n in range(clients)]
    told = scene(
        *names, rounds=3, skip_model_tests=True, sampling="fixed", clients_per_round=sampled
    )
    found = {}
    for _ in range(2):
        tasks = Task.objects.filter(round=told.round, state="open")
        asked = [task.user.username for task in tasks.select_related("user")]
        idle = next(name for name in names if name not in asked)
        found["a task"] = counted(lambda: task_next(user=told.sites[asked[0]]))  # noqa: B023
        found["nothing to do"] = counted(lambda: task_next(user=told.sites[idle]))  # noqa: B023
        for name in asked[:-1]:
            found["an update"] = counted(lambda: told.send(name, 1.0))  # noqa: B023
        found["the last update"] = counted(lambda: told.send(asked[-1], 1.0))  # noqa: B023
        found["aggregation and the next round"] = counted(told.work)
    return found


def test_a_round_of_many_costs_as_many_queries_as_one_of_few() -> None:
    few = costs(4, 2, "few")
    User.objects.update(username=Concat(Value("former-"), "username"))  # scenes name theirs alike

    many = costs(9, 7, "many")

    assert many == few
