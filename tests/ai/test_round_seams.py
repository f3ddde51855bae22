"""Where policies, modes, controls, initial weights and heartbeats meet: what neither of them promises alone."""

from datetime import timedelta

import pytest
from django.utils import timezone
from safetensors.numpy import save

from fl_server_ai.services.controls import (
    round_extend,
    training_pause,
    training_resume,
    training_retry,
)
from fl_server_ai.services.joining import initial_submit
from fl_server_ai.services.reconciler import sweep
from fl_server_ai.services.tasks import task_failure, task_next, task_progress
from fl_server_ai.services.trainings import training_clients_remove, training_start
from fl_server_core.exceptions import RoundClosed
from fl_server_core.lifecycle import RoundPhase, TaskState, TrainingState, UpdateState
from fl_server_core.models import (
    Blob,
    GlobalModel,
    LocalModel,
    ModelVersion,
    Round,
    Task,
    Training,
    User,
)
from fl_server_core.selectors import gaps, outcome, with_gaps
from fl_server_core.services.blocked import blocked_on
from fl_server_core.services.trainings import training_add_clients
from tests.scenes import Scene, scene, staged, weights

pytestmark = pytest.mark.django_db
BUFFERED = {"mode": "buffered", "buffer_size": 2, "skip_model_tests": True}
HOUR = timedelta(hours=1)


def overdue(running: Scene) -> None:
    Round.objects.filter(pk=running.round.pk).update(deadline=timezone.now() - timedelta(seconds=1))


def time_passes(running: Scene, span: timedelta) -> None:
    """As if all that has happened so far had happened so much earlier."""
    for round in Round.objects.all():
        moved = {"started_at": round.started_at - span}
        if round.deadline is not None:
            moved["deadline"] = round.deadline - span
        Round.objects.filter(pk=round.pk).update(**moved)
    for task in Task.objects.all():
        moved = {"created_at": task.created_at - span}
        for name in ("not_before", "progress_at", "fetched_at"):
            if getattr(task, name) is not None:
                moved[name] = getattr(task, name) - span
        Task.objects.filter(pk=task.pk).update(**moved)
    now = running.now
    if now.steered_at is not None:
        Training.objects.filter(pk=now.pk).update(steered_at=now.steered_at - span)


def fail(running: Scene, site: str, kind: str = "train") -> None:
    task = running.task(site, kind)
    task_failure(task=task, user=running.sites[site], code="OOM", text="")


def report(running: Scene, site: str) -> None:
    task = Task.objects.filter(user=running.sites[site], state=TaskState.OPEN).get()
    task_progress(task=task, user=running.sites[site], step=1, of=2)


# --- initial weights -----------------------------------------------------------------------------


def weightless(*names: str, **options) -> Scene:
    """A training that has been started, and whose weights come from a site."""
    options = {"skip_model_tests": True, **options}
    running = scene(*names, started=False, **options)
    GlobalModel.objects.filter(pk=running.model.pk).update(awaits_weights=True)
    running.training.refresh_from_db()
    training_start(training=running.training, user=running.actor)
    running.training.refresh_from_db()
    return running


def asked(running: Scene) -> list[Task]:
    return list(Task.objects.filter(kind="initial_weights", state=TaskState.OPEN))


def name_of(running: Scene, task: Task) -> str:
    (name,) = (name for name, user in running.sites.items() if user.pk == task.user_id)
    return name


def give(running: Scene, task: Task, value: float) -> None:
    owner = User.objects.get(pk=task.user_id)
    initial_submit(task=task, owner=owner, file=staged(save(weights(value))), sha256=None)


def all_fail(running: Scene, most: int = 10) -> None:
    for _ in range(most):
        for task in asked(running):
            fail(running, name_of(running, task), "initial_weights")


def test_a_retry_for_want_of_initial_weights_asks_one_site_at_a_time_and_each_once_more() -> None:
    running = weightless("a", "b", "c")
    all_fail(running)
    assert running.now.reason.startswith("NO_INITIAL_WEIGHTS")

    training_retry(training=running.training, user=running.actor)

    turns = []
    while running.now.state == TrainingState.ONGOING:
        (task,) = asked(running)
        turns.append(name_of(running, task))
        fail(running, turns[-1], "initial_weights")
    assert sorted(turns) == ["a", "b", "c"]
    assert running.now.reason.startswith("NO_INITIAL_WEIGHTS")


def test_with_the_policy_wait_one_site_is_asked_for_weights_again_and_not_all() -> None:
    running = weightless("a", "b", "c", failure_policy="wait")

    for _ in range(7):
        (task,) = asked(running)
        fail(running, name_of(running, task), "initial_weights")

    assert len(asked(running)) == 1


def test_initial_weights_are_set_once_whoever_else_has_an_open_part() -> None:
    running = weightless("a", "b")
    (task,) = asked(running)
    (other,) = (user for user in running.sites.values() if user.pk != task.user_id)
    second = Task.objects.create(round=running.round, user=other, kind="initial_weights", number=0)
    give(running, task, 3.0)
    digest = running.digest()

    with pytest.raises(RoundClosed):
        give(running, second, 4.0)

    assert running.digest() == digest
    assert task_next(user=other)["task"]["kind"] == "train"


def test_the_time_for_initial_weights_is_not_taken_from_a_buffered_round() -> None:
    running = weightless("a", "b", round_deadline=3_600, **BUFFERED)
    (task,) = asked(running)
    Round.objects.update(deadline=timezone.now() + timedelta(seconds=5))

    give(running, task, 3.0)

    assert running.round.deadline - timezone.now() > timedelta(minutes=59)


def test_initial_weights_that_come_in_a_pause_leave_the_round_its_whole_time() -> None:
    running = weightless("a", "b", round_deadline=3_600, **BUFFERED)
    (task,) = asked(running)
    Round.objects.update(deadline=timezone.now() + timedelta(seconds=5))
    training_pause(training=running.training, user=running.actor)

    give(running, task, 3.0)
    training_resume(training=running.training, user=running.actor)

    assert running.round.deadline - timezone.now() > timedelta(minutes=59)
    assert {task_next(user=user)["task"]["kind"] for user in running.sites.values()} == {"train"}


def test_a_site_that_reports_while_it_makes_initial_weights_is_waited_for() -> None:
    running = weightless("a", "b", round_deadline=3_600)
    (task,) = asked(running)
    time_passes(running, HOUR)
    report(running, name_of(running, task))

    sweep()

    assert [part.pk for part in asked(running)] == [task.pk]


# --- asynchronous modes --------------------------------------------------------------------------


def test_a_site_that_reports_progress_is_waited_for_in_asynchronous_modes_too() -> None:
    running = scene(
        "slow", method="FedAsync", mode="async", round_deadline=3_600, skip_model_tests=True
    )
    task_next(user=running.sites["slow"])
    time_passes(running, HOUR)
    report(running, "slow")

    sweep()

    assert running.now.state == TrainingState.ONGOING
    assert running.task("slow").state == TaskState.OPEN


def test_a_site_at_work_on_an_older_version_is_a_reason_to_wait() -> None:
    running = scene("fast", "slow", method="FedAsync", mode="async", rounds=3, round_deadline=3_600,
                    skip_model_tests=True)  # fmt: skip
    task_next(user=running.sites["slow"])
    running.send("fast", 1.0)
    running.work()
    fail(running, "fast")
    time_passes(running, HOUR + timedelta(minutes=1))
    report(running, "slow")

    sweep()

    assert running.now.state == TrainingState.ONGOING


def test_who_is_silent_past_the_deadline_is_late_in_asynchronous_modes_as_before() -> None:
    running = scene(
        "slow", method="FedAsync", mode="async", round_deadline=3_600, skip_model_tests=True
    )
    task_next(user=running.sites["slow"])
    report(running, "slow")
    time_passes(running, HOUR)

    sweep()

    assert running.now.state == TrainingState.ERROR


def test_a_pause_stops_the_clock_of_parts_that_outlive_their_rounds() -> None:
    running = scene("a", "b", round_deadline=3_600, **BUFFERED)
    for user in running.sites.values():
        task_next(user=user)
    training_pause(training=running.training, user=running.actor)
    time_passes(running, 3 * HOUR)

    training_resume(training=running.training, user=running.actor)
    sweep()

    assert running.now.state == TrainingState.ONGOING
    assert {running.task(site).state for site in running.sites} == {TaskState.OPEN}
    assert {task_next(user=user)["state"] for user in running.sites.values()} == {"task"}


def test_more_time_for_a_buffered_round_is_more_time_for_its_parts() -> None:
    running = scene("a", "b", round_deadline=3_600, **BUFFERED)
    for user in running.sites.values():
        task_next(user=user)
    round_extend(training=running.training, user=running.actor, seconds=7_200)
    time_passes(running, HOUR + timedelta(minutes=1))

    sweep()

    assert running.now.state == TrainingState.ONGOING
    assert {running.task(site).state for site in running.sites} == {TaskState.OPEN}


def test_a_site_that_comes_back_is_asked_although_others_have_failed() -> None:
    running = scene("a", "b", started=False, seen_within=90.0, **BUFFERED)
    User.objects.filter(pk=running.sites["a"].pk).update(last_seen_at=timezone.now())
    training_start(training=running.training, user=running.actor)
    fail(running, "a")
    User.objects.filter(pk=running.sites["b"].pk).update(last_seen_at=timezone.now())

    sweep()

    assert running.task("b").state == TaskState.OPEN


def test_an_older_part_comes_with_the_extras_of_its_own_version() -> None:
    running = scene(
        "fast", "slow", method="FedAsync", mode="async", rounds=3, skip_model_tests=True
    )
    digests = []
    for version in (running.now.model.weights,):
        version.shared = Blob.objects.create(name="x", digest="0" * 64, size=1)
        version.save()
        digests.append(version.shared.digest)
    task_next(user=running.sites["slow"])
    running.send("fast", 1.0)
    running.work()
    newest = ModelVersion.objects.order_by("-number").first()
    newest.shared = Blob.objects.create(name="y", digest="1" * 64, size=1)
    newest.save()

    task = task_next(user=running.sites["slow"])["task"]

    assert task["model"]["version"] == 0
    assert task["extras"]["sha256"] == "0" * 64
    assert task["extras"]["url"].endswith("?version=0")


# --- late updates --------------------------------------------------------------------------------


def test_a_retry_asks_nobody_again_whose_late_update_counts_already() -> None:
    running = scene("fast", "slow", rounds=4, late_updates="next_round", skip_model_tests=True,
                    max_failure_rate=0.5)  # fmt: skip
    running.send("fast", 2.0)
    overdue(running)
    sweep()
    running.work()
    Round.objects.filter(pk=running.round.pk).update(
        policy={**running.round.policy, "min_updates": 2}
    )
    running.send("slow", 1.0, round=0)
    fail(running, "fast")
    assert running.now.state == TrainingState.ERROR

    training_retry(training=running.training, user=running.actor)

    assert running.task("slow").state == TaskState.CANCELLED
    assert running.task("fast").state == TaskState.OPEN
    running.send("fast", 1.0)
    assert running.round.phase == RoundPhase.AGGREGATING


def test_who_failed_but_whose_late_update_counts_is_not_asked_again() -> None:
    running = scene("fast", "slow", rounds=4, late_updates="next_round", buffer_size=1,
                    failure_policy="wait", skip_model_tests=True)  # fmt: skip
    running.send("fast", 2.0)
    running.work()
    Round.objects.filter(pk=running.round.pk).update(
        policy={**running.round.policy, "buffer_size": None}
    )
    Task.objects.filter(pk=running.task("slow").pk).update(state=TaskState.FAILED, failure="OOM: ")

    running.send("slow", 1.0, round=0)

    assert running.task("slow").state == TaskState.FAILED
    assert running.round.tasks.filter(state=TaskState.OPEN).count() == 1


def test_a_late_update_is_taken_while_moments_are_collected() -> None:
    running = scene("fast", "slow", rounds=2, late_updates="next_round", uncertainty="SWAG",
                    uncertainty_options={}, swag_rounds="every", skip_model_tests=True)  # fmt: skip
    running.send("fast", 2.0)
    overdue(running)
    sweep()
    running.work()
    assert running.now.state == TrainingState.SWAG_ROUND

    receipt = running.send("slow", 1.0, round=0)

    assert receipt.update.state == UpdateState.RECEIVED


def test_a_refused_late_update_gives_its_files_up() -> None:
    running = scene("fast", "slow", rounds=2, late_updates="next_round", skip_model_tests=True)
    running.send("fast", 2.0)
    overdue(running)
    sweep()
    running.work()
    training_pause(training=running.training, user=running.actor)
    late = running.send("slow", 1.0, round=0).update
    mask = Blob.objects.create(name="m", digest="0" * 64, size=1)
    LocalModel.objects.filter(pk=late.pk).update(mask=mask, state=UpdateState.RECEIVED, extras=mask)
    Training.objects.update(state=TrainingState.COMPLETED)

    sweep()

    late.refresh_from_db()
    assert (late.state, late.blob, late.extras, late.mask) == ("refused", None, None, None)


# --- rounds that are skipped or extended ---------------------------------------------------------


def short(**options) -> Scene:
    """Round 0 has been skipped with one update in."""
    running = scene("a", "b", min_updates=2, at_deadline="skip", rounds=2, skip_model_tests=True,
                    weighting="uniform", **options)  # fmt: skip
    running.send("a", 2.0)
    overdue(running)
    sweep()
    running.work()
    return running


def test_what_came_to_a_skipped_round_is_refused_with_the_reason() -> None:
    running = short()

    update = LocalModel.objects.get()
    assert update.state == UpdateState.REFUSED
    assert update.reason.startswith("ROUND_SKIPPED")
    assert update.blob is None
    assert running.round.number == 1


def test_what_came_to_a_skipped_round_counts_in_the_next_where_late_updates_do() -> None:
    running = short(late_updates="next_round")

    running.send("b", 4.0)
    running.work()

    assert set(running.current()["layer.bias"].tolist()) == {3.0}
    update = LocalModel.objects.get(owner=running.sites["a"])
    assert (update.round.number, update.trained_in.number, update.staleness) == (1, 0, 0)
    assert running.now.state == TrainingState.COMPLETED


def test_the_last_buffered_round_ends_all_parts_even_if_it_is_skipped() -> None:
    running = scene("a", "b", rounds=1, at_deadline="skip", min_updates=2, **BUFFERED)
    overdue(running)

    sweep()
    running.work()

    assert running.now.state == TrainingState.COMPLETED
    assert not Task.objects.filter(state=TaskState.OPEN).exists()


def test_a_training_whose_rounds_were_skipped_as_nobody_was_there_has_gaps() -> None:
    running = scene("a", "b", at_deadline="skip", rounds=1, skip_model_tests=True, started=False,
                    seen_within=90.0)  # fmt: skip
    training_start(training=running.training, user=running.actor)
    overdue(running)
    sweep()
    running.work()

    training = running.now
    assert training.state == TrainingState.COMPLETED
    assert outcome(training) == "completed_with_gaps"
    assert outcome(with_gaps(Training.objects.all()).get()) == "completed_with_gaps"
    (gap,) = gaps(training=training, visible_to=running.actor)
    assert gap.text == "round 0: skipped, nobody could be asked"


def test_a_round_that_nobody_is_left_in_is_not_extended() -> None:
    running = scene("a", "b", at_deadline="extend")

    training_clients_remove(
        training=running.training, user=running.actor,
        clients=[user.pk for user in running.sites.values()],
    )  # fmt: skip

    assert running.now.state == TrainingState.ERROR
    assert running.round.extensions == 0


def test_a_retry_gives_a_round_its_extensions_back() -> None:
    running = scene("a", "b", at_deadline="extend", max_extensions=1, min_updates=2)
    for _ in range(2):
        overdue(running)
        sweep()
    assert running.now.state == TrainingState.ERROR

    training_retry(training=running.training, user=running.actor)
    overdue(running)
    sweep()

    assert running.now.state == TrainingState.ONGOING
    assert running.round.extensions == 1


def test_the_policy_wait_waits_for_sites_that_could_not_be_asked_yet() -> None:
    running = scene("a", "b", failure_policy="wait", seen_within=90.0, started=False)
    training_start(training=running.training, user=running.actor)
    overdue(running)
    sweep()
    assert running.now.state == TrainingState.ONGOING

    User.objects.filter(client=True).update(last_seen_at=timezone.now())
    sweep()

    assert {running.task(site).state for site in running.sites} == {TaskState.OPEN}


def test_a_swag_round_that_is_over_stays_over_when_somebody_comes_back() -> None:
    running = scene("a", "b", rounds=1, uncertainty="SWAG", skip_model_tests=True)
    required = str(running.sites["b"].pk)
    for site in running.sites:
        running.send(site, 1.0)
    running.work()
    Round.objects.update(policy={**running.round.policy, "required": [required]})
    clients = [running.sites["b"].pk]
    Task.objects.filter(pk=running.task("a", "swag").pk).update(state=TaskState.DONE)
    training_clients_remove(training=running.training, user=running.actor, clients=clients)
    assert running.round.events.filter(type="SWAGRoundFinished").exists()
    training_add_clients(training=running.training, user=running.actor, clients=clients)
    overdue(running)

    sweep()

    assert running.now.state == TrainingState.SWAG_ROUND


# --- what it waits for ---------------------------------------------------------------------------


def test_who_may_not_be_asked_yet_is_named_with_what_happens_then() -> None:
    running = scene("a", "b", started=False, seen_within=90.0)
    training_start(training=running.training, user=running.actor)

    found = blocked_on(training=running.now, visible_to=running.actor)

    assert found.code == "SITES"
    assert {(one.name, one.state) for one in found.who} == {("a", "offline"), ("b", "offline")}
    assert found.then == "it ends in ERROR (1 is needed)"
    assert "a (offline, never heard from)" in found.text


def test_who_has_not_joined_with_what_is_required_is_named() -> None:
    running = scene("a", "b", require={"site": "x"})

    found = blocked_on(training=running.now, visible_to=running.actor)

    assert {(one.name, one.state) for one in found.who} == {("a", "unready"), ("b", "unready")}
    assert "site" in found.text
