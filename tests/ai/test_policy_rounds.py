"""Round policies at work: who is asked, what closes a round, and what happens at its deadline."""

import uuid
from datetime import timedelta

import pytest
from django.utils import timezone

from fl_server_ai.services.reconciler import sweep
from fl_server_ai.services.tasks import task_failure, task_next
from fl_server_ai.services.trainings import training_clients_remove, training_start
from fl_server_core.exceptions import Conflict, Invalid, RoundClosed
from fl_server_core.lifecycle import RoundPhase, TaskState
from fl_server_core.models import ModelVersion, Round, Task, Training, User
from fl_server_core.selectors import gaps
from fl_server_core.services.sampling import sample_draw
from fl_server_core.services.trainings import training_add_clients
from tests.scenes import Scene, person, scene

pytestmark = pytest.mark.django_db
SITES = ("a", "b", "c", "d", "e")


def overdue(running: Scene) -> None:
    Round.objects.filter(pk=running.round.pk).update(deadline=timezone.now() - timedelta(seconds=1))


def asked(running: Scene) -> set[str]:
    tasks = running.round.tasks.filter(kind="train").select_related("user")
    return {task.user.username for task in tasks}


def send_all(running: Scene, value: float = 1.0) -> set[str]:
    """Everybody who was asked in the current round answers, and the worker works."""
    names = asked(running)
    for name in sorted(names):
        running.send(name, value)
    running.work()
    return names


def remove(running: Scene, site: str) -> None:
    training_clients_remove(
        training=running.training, user=running.actor, clients=[running.sites[site].pk]
    )


def start(running: Scene) -> None:
    training_start(training=running.training, user=running.actor)


def unstarted_ids(running: Scene, *names: str) -> list[str]:
    return [str(running.sites[name].pk) for name in names]


# --- sampling ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, 5),
        ({"sampling": "fixed", "clients_per_round": 2}, 2),
        ({"sampling": "fixed", "clients_per_round": 9}, 5),
        ({"sampling": "fraction", "client_fraction": 0.5}, 3),
        ({"sampling": "round_robin", "clients_per_round": 2}, 2),
        ({"sampling": "sticky", "clients_per_round": 3}, 3),
        ({"sampling": "fixed", "clients_per_round": 2, "over_selection": 1.5}, 3),
        ({"sampling": "fixed", "clients_per_round": 4, "over_selection": 9.0}, 5),
    ],
)
def test_a_round_asks_the_sample_and_nobody_else(options, size) -> None:
    running = scene(*SITES, **options)

    names = asked(running)

    assert len(names) == size
    for name in set(SITES) - names:
        assert task_next(user=running.sites[name])["state"] == "wait"
        with pytest.raises(RoundClosed) as refusal:
            running.send(name, 1.0)
        assert refusal.value.error_code == "NOT_SELECTED"


def test_a_sample_follows_from_the_trainings_seed_and_the_rounds_number() -> None:
    running = scene(*SITES, rounds=4, sampling="fixed", clients_per_round=2, skip_model_tests=True)
    names = {str(user.pk): name for name, user in running.sites.items()}

    for number in range(4):
        drawn = sample_draw("fixed", names, seed=running.now.seed, number=number, count=2)
        assert send_all(running) == {names[pk] for pk in drawn}


def test_in_turn_everybody_is_asked_before_anybody_is_asked_twice() -> None:
    running = scene(*SITES[:4], rounds=4, sampling="round_robin", clients_per_round=2,
                    skip_model_tests=True)  # fmt: skip

    first, second = send_all(running), send_all(running)
    third, fourth = send_all(running), send_all(running)

    assert first | second == third | fourth == set(SITES[:4])
    assert running.now.state == "C"


def test_a_sticky_sample_stays_until_somebody_goes() -> None:
    running = scene(*SITES, rounds=3, sampling="sticky", clients_per_round=3,
                    skip_model_tests=True)  # fmt: skip
    first, second = send_all(running), asked(running)

    gone = min(first)
    remove(running, gone)
    for name in second - {gone}:
        running.send(name, 1.0)
    running.work()

    assert first == second
    assert first - {gone} < asked(running)
    assert len(asked(running)) == 3


def test_who_joins_or_comes_back_changes_later_rounds_only() -> None:
    running = scene(*SITES[:2], sampling="fixed", clients_per_round=3, skip_model_tests=True)
    late = person("late", client=True)

    training_add_clients(training=running.training, user=running.actor, clients=[late.pk])
    assert asked(running) == {"a", "b"}
    send_all(running)

    assert asked(running) == {"a", "b", "late"}


def test_only_those_who_were_seen_lately_are_asked() -> None:
    running = scene(*SITES, started=False, seen_within=120.0)
    User.objects.filter(username__in=["a", "b"]).update(last_seen_at=timezone.now())
    User.objects.filter(username="c").update(last_seen_at=timezone.now() - timedelta(seconds=130))

    start(running)

    assert asked(running) == {"a", "b"}


def test_with_too_few_there_the_round_waits_and_asks_as_soon_as_enough_are() -> None:
    running = scene(*SITES, started=False, seen_within=120.0, min_updates=2)
    User.objects.filter(username="a").update(last_seen_at=timezone.now())
    start(running)
    assert asked(running) == set()
    assert task_next(user=running.sites["a"])["state"] == "wait"

    User.objects.filter(username="b").update(last_seen_at=timezone.now())
    sweep()

    assert asked(running) == {"a", "b"}
    assert send_all(running) == {"a", "b"}


def test_with_nobody_there_the_deadline_decides() -> None:
    running = scene(*SITES, started=False, seen_within=120.0)
    start(running)
    sweep()
    assert running.now.state == "O"

    overdue(running)
    sweep()

    assert running.now.state == "E"
    assert running.now.reason.startswith("NOT_ENOUGH_UPDATES: round 0 ended with 0 of 0")


def test_an_empty_poisson_draw_skips_the_round_at_once() -> None:
    running = scene(*SITES, started=False, rounds=30, sampling="poisson", client_fraction=0.2,
                    skip_model_tests=True)  # fmt: skip
    Training.objects.filter(pk=running.training.pk).update(seed=3)
    start(running)
    while running.now.state == "O":
        for name in asked(running):
            running.send(name, 1.0)
        assert running.work()

    phases = list(Round.objects.order_by("number").values_list("phase", flat=True))
    assert running.now.state == "C"
    assert len(phases) == 30
    assert 2 < phases.count("skipped") < 20  # about 30 * 0.8 ** 5
    aggregated = phases.count("done")
    assert ModelVersion.objects.filter(model=running.now.model).count() == 1 + aggregated


# --- closing -----------------------------------------------------------------------------------


def test_a_round_closes_at_its_bth_update_although_more_were_asked() -> None:
    running = scene(*SITES, buffer_size=2, skip_model_tests=True)

    assert running.send("a", 1.0).needed == 2
    running.send("b", 3.0)

    assert running.round.phase == RoundPhase.AGGREGATING
    left = Task.objects.filter(round=running.round, state=TaskState.CANCELLED)
    assert left.count() == 3
    assert left[0].failure.startswith("ROUND_FULL")
    with pytest.raises(RoundClosed):
        running.send("c", 1.0)
    running.work()
    assert running.current()["layer.bias"].tolist() == [2.0] * 3
    assert asked(running) == set(SITES)
    assert gaps(training=running.now, visible_to=running.actor) == []


def test_over_selection_closes_with_the_number_that_sampling_says() -> None:
    running = scene(*SITES, sampling="fixed", clients_per_round=2, over_selection=2.0)
    names = sorted(asked(running))
    assert len(names) == 4

    running.send(names[0], 1.0)
    running.send(names[1], 1.0)

    assert running.round.phase == RoundPhase.AGGREGATING
    assert running.round.policy["buffer_size"] == 2


def test_no_round_closes_without_those_who_are_required() -> None:
    running = scene(*SITES, started=False)
    Training.objects.filter(pk=running.training.pk).update(
        options={"buffer_size": 2, "required": unstarted_ids(running, "e")}
    )
    start(running)

    for name in "abc":
        running.send(name, 1.0)
    assert running.round.phase == RoundPhase.COLLECTING
    running.send("e", 1.0)

    assert running.round.phase == RoundPhase.AGGREGATING


def test_who_is_required_and_taken_out_is_required_no_more() -> None:
    running = scene("a", "b", started=False)
    Training.objects.filter(pk=running.training.pk).update(
        options={"required": unstarted_ids(running, "b")}
    )
    start(running)
    running.send("a", 1.0)

    remove(running, "b")

    assert running.round.phase == RoundPhase.AGGREGATING


def test_a_required_site_that_failed_ends_the_training_by_default() -> None:
    running = scene("a", "b", started=False)
    Training.objects.filter(pk=running.training.pk).update(
        options={"required": unstarted_ids(running, "b")}
    )
    start(running)
    running.send("a", 1.0)

    task_failure(task=running.task("b"), user=running.sites["b"], code="OOM", text="")

    assert running.now.state == "E"


# --- the deadline ------------------------------------------------------------------------------


def test_extend_waits_longer_a_limited_number_of_times() -> None:
    running = scene("a", "b", min_updates=2, at_deadline="extend", max_extensions=2)
    running.send("a", 1.0)

    for extensions in (1, 2):
        overdue(running)
        sweep()
        assert running.now.state == "O"
        assert running.round.extensions == extensions
        assert running.round.deadline > timezone.now()
        assert running.task("b").attempt == 1 + extensions
    overdue(running)
    sweep()

    assert running.now.reason.startswith("NOT_ENOUGH_UPDATES: round 0 ended with 1 of 2")


def test_an_extended_round_goes_on_with_what_has_arrived_by_then() -> None:
    running = scene("a", "b", "c", min_updates=2, at_deadline="extend")
    running.send("a", 1.0)
    overdue(running)
    sweep()

    running.send("b", 1.0)
    assert running.round.phase == RoundPhase.COLLECTING
    overdue(running)
    sweep()

    assert running.round.phase == RoundPhase.AGGREGATING


def test_skip_keeps_the_model_and_moves_the_number_on() -> None:
    running = scene("a", "b", min_updates=2, at_deadline="skip", rounds=2)
    before = running.digest()
    running.send("a", 1.0)
    overdue(running)

    sweep()
    skipped = running.round
    running.work()

    assert skipped.phase == RoundPhase.SKIPPED
    assert skipped.reason.startswith("NOT_ENOUGH_UPDATES")
    assert (running.now.model.round, running.digest()) == (1, before)
    assert running.round.number == 1
    assert running.round.base_version.number == 0
    send_all(running, 4.0)
    assert running.now.model.weights.number == 2
    assert running.round.phase == RoundPhase.TESTING


def test_a_last_round_that_is_skipped_ends_the_training() -> None:
    running = scene("a", "b", min_updates=2, at_deadline="skip", rounds=1)
    overdue(running)

    sweep()
    running.work()
    assert running.round.phase == RoundPhase.TESTING
    for name in ("a", "b"):
        running.report(name, {"loss": 1.0})
    running.work()

    assert running.now.state == "C"


def test_fail_allows_no_absence_at_the_deadline() -> None:
    running = scene("a", "b", at_deadline="fail")
    running.send("a", 1.0)
    overdue(running)

    sweep()

    assert running.now.reason.startswith("DEADLINE_MISSED: 1 of 2")


def test_an_adaptive_deadline_follows_the_last_rounds() -> None:
    running = scene(*SITES, rounds=3, deadline_factor=2.0, round_deadline=3600.0,
                    skip_model_tests=True)  # fmt: skip
    assert running.round.policy["round_deadline"] == 3600.0
    ago = timezone.now() - timedelta(seconds=100)
    Task.objects.update(created_at=ago)

    send_all(running)

    seconds = running.round.policy["round_deadline"]
    assert 200 <= seconds < 230
    assert abs((running.round.deadline - timezone.now()).total_seconds() - seconds) < 10


# --- the rest ----------------------------------------------------------------------------------


def test_models_are_tested_every_kth_round_and_at_the_end() -> None:
    running = scene("a", rounds=5, test_every=2)
    tested = []
    while running.now.state == "O":
        if running.round.phase == RoundPhase.TESTING:
            tested.append(running.now.model.round)
            running.report("a", {"loss": 1.0})
            running.work()
        else:
            send_all(running)

    assert tested == [2, 4, 5]


def test_who_has_nothing_to_do_is_told_when_to_come_back() -> None:
    running = scene(*SITES, sampling="fixed", clients_per_round=1, check_in=100.0)
    idle = set(SITES) - asked(running)

    pauses = {task_next(user=running.sites[name])["retry_after"] for name in idle}

    assert len(pauses) == 4
    assert all(50 <= pause < 150 for pause in pauses)


@pytest.mark.parametrize(
    ("options", "pointer"),
    [
        ({"sampling": "fixed"}, "clients_per_round"),
        ({"clients_per_round": 2}, "clients_per_round"),
        ({"sampling": "poisson"}, "client_fraction"),
        ({"sampling": "poisson", "client_fraction": 1.5}, "client_fraction"),
        ({"sampling": "lottery"}, "sampling"),
        ({"over_selection": 2.0}, "over_selection"),
        ({"required": ["ada"]}, "required"),
        ({"buffer_size": 2, "min_updates": 3}, "min_updates"),
        ({"sampling": "fixed", "clients_per_round": 2, "min_updates": 3}, "min_updates"),
        ({"failure_policy": "wait", "at_deadline": "skip"}, "at_deadline"),
        ({"at_deadline": "skip", "daisy_chain_period": 2}, "at_deadline"),
        ({"at_deadline": "skip", "uncertainty": "SWAG"}, "at_deadline"),
        ({"method": "Krum", "f": 1, "buffer_size": 4}, "buffer_size"),
        ({"method": "Krum", "f": 1, "sampling": "fixed", "clients_per_round": 4},
         "clients_per_round"),
    ],
)  # fmt: skip
def test_what_can_never_be_is_refused_with_a_pointer(options, pointer) -> None:
    with pytest.raises(Invalid) as refusal:
        scene(*SITES, started=False, **options)

    assert [error["pointer"] for error in refusal.value.data["errors"]] == [f"/options/{pointer}"]


@pytest.mark.parametrize(
    "options",
    [
        {"min_updates": 3},
        {"sampling": "fraction", "client_fraction": 0.4, "min_updates": 2},
        {"method": "FedBuff", "buffer_size": 3},
    ],
)
def test_what_these_clients_can_never_do_is_refused_at_the_start(options) -> None:
    with pytest.raises(Conflict) as refusal:
        scene("a", "b", **options)

    assert refusal.value.error_code == "POLICY_UNSATISFIABLE"


def test_a_required_site_has_to_take_part_when_the_training_starts() -> None:
    with pytest.raises(Conflict) as refusal:
        scene("a", "b", required=[str(uuid.uuid4())])

    assert "required" in refusal.value.detail
