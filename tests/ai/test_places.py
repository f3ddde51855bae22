"""Long-polls leave threads for everybody else."""

from contextlib import ExitStack
from typing import Any

import pytest

from fl_server_ai.notifications import wakeups
from fl_server_ai.services.places import EACH, place, places
from fl_server_ai.services.tasks import task_wait
from tests.scenes import scene


@pytest.mark.parametrize(
    ("threads", "expected"), [(250, 200), (128, 78), (100, 50), (60, 30), (8, 4), (1, 0)]
)
def test_half_of_the_threads_or_all_but_fifty_may_wait(settings, threads: int, expected) -> None:
    settings.FL_WEB_THREADS = threads

    assert places() == expected


def test_nobody_takes_more_than_his_places_and_gives_them_back() -> None:
    with ExitStack() as stack:
        granted = [stack.enter_context(place("ada")) for _ in range(EACH + 2)]
        other = stack.enter_context(place("grace"))

        assert granted == [True] * EACH + [False] * 2
        assert other
    with place("ada") as again:
        assert again


def test_all_together_leave_threads_free(settings) -> None:
    settings.FL_WEB_THREADS = 8

    with ExitStack() as stack:
        granted = [stack.enter_context(place(f"site {number}")) for number in range(6)]

    assert granted == [True] * 4 + [False] * 2


@pytest.mark.django_db
def test_a_poll_too_many_is_answered_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    told = scene("ada", "grace", started=False)
    waited: list[str] = []

    def wait(user: str, _seen: int, _seconds: float) -> Any:
        waited.append(user)
        wakeups.wake([user])
        raise TimeoutError  # that it would wait is enough here

    monkeypatch.setattr(wakeups, "wait", wait)
    ada, grace = told.sites["ada"], told.sites["grace"]
    with ExitStack() as stack:
        for _ in range(EACH):
            stack.enter_context(place(str(ada.pk)))

        answer = task_wait(user=ada, seconds=20.0)
        with pytest.raises(TimeoutError):
            task_wait(user=grace, seconds=20.0)

    assert (answer["state"], answer["retry_after"]) == ("wait", 2.0)
    assert waited == [str(grace.pk)]
