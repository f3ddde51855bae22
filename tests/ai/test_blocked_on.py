"""What a training waits for is told truly: who, since when, until when, and what happens then."""

from datetime import timedelta

import pytest
from django.utils import timezone

from fl_server_ai.services.controls import training_pause
from fl_server_ai.services.reconciler import sweep
from fl_server_ai.services.tasks import task_failure, task_next, task_progress
from fl_server_core.lifecycle import RoundPhase, TaskState
from fl_server_core.models import Round, Task, TrainerEvent, Training, User
from fl_server_core.selectors import Part, part_of
from fl_server_core.services.blocked import Blocked, blocked_on
from fl_server_core.services.events import event_claim, event_release
from fl_server_core.services.heartbeats import phase_end
from tests.scenes import Scene, scene

pytestmark = pytest.mark.django_db


def told(running: Scene, viewer: User | None = None) -> Blocked:
    found = blocked_on(training=running.now, visible_to=viewer or running.actor)
    assert found is not None
    return found


def seen(running: Scene, site: str, seconds: float) -> None:
    """This site was last heard from so many seconds ago."""
    User.objects.filter(pk=running.sites[site].pk).update(
        last_seen_at=timezone.now() - timedelta(seconds=seconds)
    )


def test_before_the_start_its_actor_is_waited_for() -> None:
    waiting = scene(started=False)

    found = told(waiting)

    assert (found.code, found.who[0].user) == ("NOT_STARTED", waiting.actor.pk)


def test_updates_that_are_missing_are_named_with_who_until_when_and_what_then() -> None:
    running = scene("ada", "grace", "joan", round_deadline=600.0, min_updates=2)
    running.send("ada", 1.0)
    seen(running, "grace", 5)
    task_next(user=running.sites["grace"])
    task_progress(task=running.task("grace"), user=running.sites["grace"], step=40, of=100)

    found = told(running)

    assert (found.code, found.until) == ("UPDATES", running.round.deadline)
    assert {who.name: who.state for who in found.who} == {"grace": "working", "joan": "offline"}
    assert "waits for 2 of 3 updates" in found.text
    assert "grace (working, 40 of 100)" in found.text
    assert found.then == "it ends in ERROR (2 are needed)"
    running.send("grace", 1.0)
    assert told(running).then == "it goes on with the 2 that are in"


def test_another_participant_learns_no_names_and_no_progress() -> None:
    running = scene()
    seen(running, "grace", 5)
    task_next(user=running.sites["grace"])
    task_progress(task=running.task("grace"), user=running.sites["grace"], step=40, of=100)

    by = {who.user: who for who in told(running, running.sites["ada"]).who}

    other, own = by[running.sites["grace"].pk], by[running.sites["ada"].pk]
    assert (other.name, other.last_seen, other.progress) == ("", None, None)
    assert own.name == "ada"


@pytest.mark.parametrize(
    ("fetched", "last_seen", "part"),
    [
        (False, None, Part.OFFLINE),
        (False, 1_000, Part.OFFLINE),
        (False, 5, Part.INVITED),
        (True, 5, Part.WORKING),
        (True, 1_000, Part.SILENT),
    ],
)
def test_who_is_offline_invited_working_or_silent_is_told_apart(
    fetched: bool, last_seen: float | None, part: Part
) -> None:
    running = scene()
    if last_seen is not None:
        seen(running, "ada", last_seen)
    if fetched:
        long_ago = timezone.now() - timedelta(seconds=1_000)
        Task.objects.update(fetched_at=long_ago)

    assert part_of(running.task("ada"), timezone.now()) == part


@pytest.mark.parametrize(
    ("delivered", "last_seen", "reported", "part"),
    [
        (5, None, False, Part.INVITED),
        (5, 5, False, Part.INVITED),
        (5, 5, True, Part.WORKING),
        (1_000, None, False, Part.SILENT),
        (1_000, 5, False, Part.INVITED),
    ],
)
def test_a_webhook_that_took_the_message_is_not_at_work_yet(
    delivered: float, last_seen: float | None, reported: bool, part: Part
) -> None:
    running = scene(endpoint="https://site.example/hook")
    now = timezone.now()
    task = running.task("ada")
    task.notifications.update(state="delivered", finished_at=now - timedelta(seconds=delivered))
    if last_seen is not None:
        seen(running, "ada", last_seen)
    if reported:
        Task.objects.filter(pk=task.pk).update(progress_at=now)

    (who,) = [one for one in told(running).who if one.name == "ada"]

    assert who.state == part
    assert who.last_seen == User.objects.get(username="ada").last_seen_at


@pytest.mark.parametrize(
    ("state", "failure", "part"),
    [
        (TaskState.DONE, "", Part.DONE),
        (TaskState.EXPIRED, "DEADLINE: nothing arrived in time", Part.LATE),
        (TaskState.FAILED, "OOM: no memory", Part.FAILED),
        (TaskState.FAILED, "REJECTED: 410", Part.REJECTED),
        (TaskState.FAILED, "UNREACHABLE: refused", Part.OFFLINE),
        (TaskState.CANCELLED, "REMOVED: taken out of the training", Part.REMOVED),
        (TaskState.CANCELLED, "the training ended", Part.CANCELLED),
    ],
)
def test_who_is_done_late_failed_rejected_or_removed_is_told_apart(
    state: TaskState, failure: str, part: Part
) -> None:
    running = scene()
    Task.objects.update(state=state, failure=failure)

    assert part_of(running.task("ada"), timezone.now()) == part


def test_a_worker_is_waited_for_queued_at_work_lost_and_trying_again() -> None:
    running = scene()
    running.send("ada", 1.0)
    running.send("grace", 1.0)
    assert told(running).code == "WORKER_QUEUED"

    work = event_claim(event_id=TrainerEvent.objects.get().pk)
    found = told(running)
    assert (found.code, "attempt 1, 0 of 3 have failed" in found.text) == ("WORKER", True)
    TrainerEvent.objects.update(lease_until=timezone.now() - timedelta(seconds=1))
    assert told(running).code == "WORKER_LOST"
    event_release(event=work, error="MemoryError")

    found = told(running)
    assert (found.code, "MemoryError" in found.text) == ("WORKER_RETRY", True)
    assert found.until > timezone.now()
    assert "MemoryError" not in told(running, running.sites["ada"]).text


def test_a_test_and_moments_are_waited_for() -> None:
    running = scene(rounds=1, uncertainty="SWAG")
    running.send("ada", 1.0)
    running.send("grace", 1.0)
    running.work()

    assert (told(running).code, len(told(running).who)) == ("MOMENTS", 2)
    Round.objects.update(phase=RoundPhase.TESTING)
    Task.objects.filter(kind="swag").update(kind="evaluate")
    assert told(running).code == "METRICS"


def test_a_pause_says_by_whom() -> None:
    running = scene()
    running.send("ada", 1.0)
    training_pause(training=running.training, user=running.actor)

    found = told(running)

    assert (found.code, found.who[0].user, found.until) == ("PAUSED", running.actor.pk, None)
    assert "1 of 2 updates are in" in found.text


def test_an_error_waits_for_its_actor_and_an_end_for_nobody() -> None:
    running = scene(rounds=1, skip_model_tests=True)
    for site, user in running.sites.items():
        task_failure(task=running.task(site), user=user, code="OOM", text="")
    assert told(running).code == "ERROR"
    assert told(running).text.startswith("NOT_ENOUGH_UPDATES")

    Training.objects.update(state="C")

    assert blocked_on(training=running.now, visible_to=running.actor) is None


def test_an_eta_is_guessed_from_progress_and_from_past_rounds() -> None:
    running = scene("ada", skip_model_tests=True)
    now = timezone.now()
    Task.objects.update(
        fetched_at=now - timedelta(seconds=100),
        progress_at=now,
        progress={"step": 25, "of": 100},
    )
    assert (told(running).eta - now).total_seconds() == pytest.approx(300, abs=1)

    running.send("ada", 1.0)
    running.work()
    Task.objects.filter(state="done").update(
        created_at=now - timedelta(seconds=1_000), finished_at=now
    )

    assert (told(running).eta - timezone.now()).total_seconds() == pytest.approx(1_000, abs=30)


def test_a_phase_lasts_longer_for_who_reports_progress_up_to_a_limit() -> None:
    begun = timezone.now()
    deadline = begun + timedelta(seconds=400)

    def end(beat: float | None, extends: float = 1.0) -> float:
        beats = [] if beat is None else [begun + timedelta(seconds=beat)]
        found = phase_end(deadline=deadline, asked_at=begun, heartbeats=beats, extends=extends)
        return (found - begun).total_seconds()

    assert end(None) == 400  # nobody says anything
    assert end(200) == 400  # silent for half of the phase
    assert end(395) == 495  # a quarter of the phase after the last report
    assert end(750) == 800  # twice as long at most
    assert end(750, extends=0.0) == 400
    assert end(5_000, extends=100.0) == 5_100


def test_who_reports_progress_is_not_late_who_is_silent_is() -> None:
    running = scene(round_deadline=100.0)
    running.send("grace", 1.0)
    now = timezone.now()
    Task.objects.update(created_at=now - timedelta(seconds=101))
    Round.objects.update(deadline=now - timedelta(seconds=1))
    task_progress(task=running.task("ada"), user=running.sites["ada"], step=1, of=2)

    sweep()
    assert running.task("ada").state == TaskState.OPEN
    assert told(running).until > now
    Task.objects.update(progress_at=now - timedelta(seconds=60))
    sweep()

    assert running.task("ada").state == TaskState.EXPIRED
    assert running.round.phase == RoundPhase.AGGREGATING
