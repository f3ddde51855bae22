"""Late updates, buffered and fully asynchronous modes: each update counts once, with its staleness."""

from datetime import timedelta

import pytest
from django.utils import timezone
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.django import TestCase

from fl_server_ai.services.reconciler import sweep
from fl_server_ai.services.tasks import task_failure, task_next, task_progress
from fl_server_core.exceptions import Conflict, DuplicateUpdate, Invalid, RoundClosed
from fl_server_core.lifecycle import RoundPhase, TaskState, UpdateState
from fl_server_core.models import LocalModel, ModelVersion, Round, Task
from fl_server_core.selectors import gaps
from tests.scenes import Scene, scene

pytestmark = pytest.mark.django_db


def overdue(running: Scene) -> None:
    Round.objects.filter(pk=running.round.pk).update(deadline=timezone.now() - timedelta(seconds=1))


def fetch(running: Scene, site: str) -> dict:
    """The task that a site is given now; it has then begun."""
    answer = task_next(user=running.sites[site])
    assert answer["state"] == "task", answer
    return answer["task"]


def bias(running: Scene) -> float:
    (value,) = set(running.current()["layer.bias"].tolist())
    return value


def one(running: Scene, site: str) -> LocalModel:
    return LocalModel.objects.get(owner=running.sites[site])


# --- late updates in synchronous rounds --------------------------------------------------------


def straggling(**options) -> Scene:
    """Round 0 has closed at its deadline without "slow"; round 1 is open."""
    running = scene("fast", "slow", rounds=4, late_updates="next_round", skip_model_tests=True,
                    weighting="uniform", **options)  # fmt: skip
    running.send("fast", 2.0)
    overdue(running)
    sweep()
    running.work()
    return running


def test_a_late_update_counts_in_the_next_round_with_its_staleness() -> None:
    running = straggling()
    assert bias(running) == 2.0

    receipt = running.send("slow", 1.0, round=0)
    update = one(running, "slow")
    assert receipt.created
    assert (update.round.number, update.trained_in.number, update.staleness) == (1, 0, 1)
    assert running.task("slow").failure.startswith("LATE_COUNTS")
    running.send("fast", 4.0)
    running.work()

    discount = 2**-0.5  # the late one learned +1 from 0: as if it had sent 3 from 2
    assert bias(running) == pytest.approx((4.0 + discount * 3.0) / (1 + discount), rel=1e-6)
    assert one(running, "slow").state == UpdateState.CONSUMED


@pytest.mark.parametrize("mode", ["late", "buffered"])
def test_a_late_gradient_counts_as_it_was_sent(mode: str) -> None:
    options = {"method": "FedSGD", "lr": 1.0}
    if mode == "late":
        running = straggling(**options)
    else:
        running = scene("fast", "slow", mode=mode, buffer_size=1, rounds=4, skip_model_tests=True,
                        weighting="uniform", **options)  # fmt: skip
        fetch(running, "slow")
        running.send("fast", 2.0)
        running.work()
    assert bias(running) == -2.0

    running.send("slow", 1.0, round=0)
    if mode == "late":
        running.send("fast", 4.0)
    running.work()

    discount = 2**-0.5
    mean = (4.0 + discount * 1.0) / (1 + discount) if mode == "late" else 1.0
    assert bias(running) == pytest.approx(-2.0 - mean, rel=1e-6)


def test_the_same_late_update_again_gets_its_receipt_and_other_bytes_are_refused() -> None:
    running = straggling()
    running.send("slow", 1.0, round=0)

    assert not running.send("slow", 1.0, round=0).created
    with pytest.raises(DuplicateUpdate):
        running.send("slow", 5.0, round=0)
    running.send("fast", 4.0)
    running.work()

    assert not running.send("slow", 1.0, round=0).created
    assert LocalModel.objects.filter(owner=running.sites["slow"]).count() == 1


def test_a_late_update_that_comes_between_rounds_waits_for_the_next_one() -> None:
    running = straggling()
    running.send("fast", 4.0)
    overdue(running)
    sweep()
    assert running.round.phase == RoundPhase.AGGREGATING

    running.send("slow", 1.0, round=0)
    assert one(running, "slow").state == UpdateState.RECEIVED
    running.work()

    update = one(running, "slow")
    assert (update.state, update.round.number, update.staleness) == ("accepted", 2, 2)


def test_who_has_answered_already_counts_late_one_round_later() -> None:
    running = straggling()
    running.send("slow", 3.0)
    running.send("slow", 1.0, round=0)

    assert set(LocalModel.objects.filter(owner=running.sites["slow"])
               .values_list("round__number", "state")) == {(0, "received"), (1, "accepted")}  # fmt: skip
    running.send("fast", 4.0)
    running.work()

    late = LocalModel.objects.get(trained_in__number=0)
    assert (late.round.number, late.staleness) == (2, 2)


def test_an_update_that_is_too_old_is_refused() -> None:
    running = straggling(max_staleness=0)

    with pytest.raises(RoundClosed) as refusal:
        running.send("slow", 1.0, round=0)

    assert refusal.value.error_code == "TOO_STALE"


def test_late_updates_are_refused_by_default_and_of_those_who_were_not_asked() -> None:
    running = scene("fast", "slow", rounds=3, skip_model_tests=True)
    running.send("fast", 2.0)
    overdue(running)
    sweep()
    running.work()

    with pytest.raises(RoundClosed):
        running.send("slow", 1.0, round=0)


def test_a_late_client_is_told_to_go_on_where_its_update_is_welcome() -> None:
    running = straggling()
    task = Task.objects.get(round__number=0, user=running.sites["slow"])

    assert task_progress(task=task, user=running.sites["slow"], step=1)["command"] is None


def test_what_still_waits_when_the_training_ends_is_refused_with_a_reason() -> None:
    running = scene("fast", "slow", rounds=2, late_updates="next_round", skip_model_tests=True)
    running.send("fast", 2.0)
    overdue(running)
    sweep()
    running.work()
    running.send("slow", 3.0)
    running.send("slow", 1.0, round=0)
    running.send("fast", 2.0)
    running.work()
    assert running.now.state == "C"

    sweep()

    left = LocalModel.objects.get(round__number=0, owner=running.sites["slow"])
    assert (left.state, left.blob) == (UpdateState.REFUSED, None)
    assert left.reason.startswith("TRAINING_ENDED")


# --- buffered ----------------------------------------------------------------------------------


def buffered(*names: str, k: int = 2, rounds: int = 3, **options) -> Scene:
    return scene(*names, method="FedBuff", rounds=rounds, buffer_size=k, skip_model_tests=True,
                 **options)  # fmt: skip


def test_a_buffer_closes_with_k_updates_and_the_slow_ones_part_goes_on() -> None:
    running = buffered("a", "b", "slow")
    base = fetch(running, "slow")["model"]
    running.send("a", 1.0)
    running.send("b", 3.0)
    running.work()
    assert bias(running) == 2.0
    assert running.round.number == 1

    again = fetch(running, "slow")
    assert (again["round"], again["model"]) == (0, base)
    assert fetch(running, "a")["model"]["version"] == 1
    running.send("slow", 4.0, round=0)
    running.send("a", 2.0)
    running.work()

    # x + (1/K) sum S(s) D: D is 4 - 0 with s = 1, and 2 - 2 with s = 0.
    assert bias(running) == pytest.approx(2.0 + 0.5 * (2**-0.5 * 4.0 + 0.0), rel=1e-6)
    assert one(running, "slow").staleness == 1
    assert gaps(training=running.now, visible_to=running.actor) == []


def test_two_updates_of_one_client_do_not_fill_a_buffer() -> None:
    running = buffered("a", "b", "c")
    fetch(running, "b")
    fetch(running, "c")
    running.send("a", 1.0)

    assert task_next(user=running.sites["a"])["state"] == "wait"
    with pytest.raises(DuplicateUpdate):
        running.send("a", 2.0)

    assert running.round.phase == RoundPhase.COLLECTING
    assert running.send("b", 1.0).received == 2


def test_an_update_that_arrives_while_a_step_is_made_counts_in_the_next() -> None:
    running = buffered("a", "b", "c")
    for name in "abc":
        fetch(running, name)
    running.send("a", 1.0)
    running.send("b", 1.0)

    running.send("c", 1.0, round=0)
    assert one(running, "c").state == UpdateState.RECEIVED
    running.work()

    assert (one(running, "c").round.number, one(running, "c").staleness) == (1, 1)
    assert "c" not in {t.user.username for t in running.round.tasks.all()}


def test_who_has_not_begun_gets_the_newest_version() -> None:
    running = buffered("a", "b", "idle")
    running.send("a", 1.0)
    running.send("b", 1.0)
    running.work()

    assert fetch(running, "idle")["model"]["version"] == 1
    with pytest.raises(RoundClosed):
        running.send("idle", 1.0, round=0)


def test_no_more_than_the_limit_train_at_a_time_and_others_take_over() -> None:
    running = buffered("a", "b", "c", "d", k=3, sampling="fixed", clients_per_round=2)
    busy = Task.objects.filter(state=TaskState.OPEN)
    assert busy.count() == 2

    first = busy.first().user.username
    running.send(first, 1.0)

    assert busy.count() == 2
    assert first not in busy.values_list("user__username", flat=True)


def test_a_buffer_that_cannot_fill_closes_with_what_there_is() -> None:
    running = buffered("a", "b", k=2)
    running.send("a", 1.0)

    task_failure(task=running.task("b"), user=running.sites["b"], code="OOM", text="")

    assert running.round.phase == RoundPhase.AGGREGATING


def test_at_the_deadline_a_step_is_made_and_open_parts_go_on() -> None:
    running = buffered("a", "slow", k=2, round_deadline=3600.0)
    fetch(running, "slow")
    running.send("a", 1.0)
    overdue(running)

    sweep()
    running.work()

    assert running.round.number == 1
    assert Task.objects.get(user=running.sites["slow"], number=0).state == TaskState.OPEN
    running.send("slow", 1.0, round=0)
    assert one(running, "slow").round.number == 1


def test_a_part_older_than_the_staleness_limit_is_ended_and_asked_anew() -> None:
    running = buffered("a", "b", "slow", rounds=5, max_staleness=1)
    fetch(running, "slow")
    for _ in range(2):
        running.send("a", 1.0)
        running.send("b", 1.0)
        running.work()

    old = Task.objects.get(user=running.sites["slow"], number=0)
    assert old.state == TaskState.EXPIRED
    assert fetch(running, "slow")["round"] == 2
    with pytest.raises(RoundClosed) as refusal:
        running.send("slow", 1.0, round=0)
    assert refusal.value.error_code == "TOO_STALE"


def test_any_strategy_can_be_buffered() -> None:
    running = scene("a", "b", "c", method="FedAdam", mode="buffered", buffer_size=2, rounds=2,
                    skip_model_tests=True)  # fmt: skip
    fetch(running, "c")
    for _ in range(2):
        running.send("a", 1.0)
        if running.now.model.round == 0:
            running.send("b", 1.0)
        else:
            running.send("c", 1.0, round=0)
        running.work()

    assert running.now.state == "C"


def test_only_the_last_model_is_tested_unless_asked_for() -> None:
    running = scene("a", "b", method="FedBuff", rounds=2, buffer_size=1)

    running.send("a", 1.0)
    running.work()
    assert running.round.phase == RoundPhase.COLLECTING
    running.send("b", 1.0)
    running.work()

    assert running.round.phase == RoundPhase.TESTING
    assert not Task.objects.filter(kind="train", state=TaskState.OPEN).exists()


# --- fully asynchronous ------------------------------------------------------------------------


def test_fedasync_mixes_in_each_update_with_its_staleness() -> None:
    running = scene("a", "slow", method="FedAsync", rounds=3, skip_model_tests=True)
    fetch(running, "slow")

    running.send("a", 10.0)
    running.work()
    assert bias(running) == pytest.approx(6.0)
    running.send("a", 10.0)
    running.work()
    assert bias(running) == pytest.approx(0.4 * 6.0 + 0.6 * 10.0)
    running.send("slow", 1.0, round=0)
    running.work()

    alpha = 0.6 * 3**-0.5
    assert bias(running) == pytest.approx((1 - alpha) * 8.4 + alpha * 1.0, rel=1e-6)
    assert running.now.state == "C"
    assert ModelVersion.objects.filter(model=running.now.model).count() == 4


@pytest.mark.parametrize(
    ("options", "pointer"),
    [
        ({"method": "FedBuff"}, "buffer_size"),
        ({"method": "FedBuff", "buffer_size": 2, "mode": "sync"}, "mode"),
        ({"method": "FedAsync", "mode": "buffered", "buffer_size": 2}, "mode"),
        ({"method": "FedAsync", "buffer_size": 2}, "buffer_size"),
        ({"method": "FedAvg", "mode": "async"}, "mode"),
        ({"mode": "buffered", "buffer_size": 2, "sampling": "poisson", "client_fraction": 0.5},
         "sampling"),
        ({"mode": "buffered", "buffer_size": 2, "daisy_chain_period": 2}, "mode"),
        ({"late_updates": "next_round", "daisy_chain_period": 2}, "late_updates"),
        ({"mode": "buffered", "buffer_size": 2, "uncertainty": "SWAG"}, "mode"),
        ({"method": "Krum", "f": 1, "mode": "buffered", "buffer_size": 4}, "buffer_size"),
        ({"method": "FedPM", "mode": "buffered", "buffer_size": 2}, "mode"),
        ({"method": "FedPM", "late_updates": "next_round"}, "late_updates"),
        ({"method": "FedDyn", "mode": "buffered", "buffer_size": 2}, "mode"),
        ({"method": "FedDyn", "late_updates": "next_round"}, "late_updates"),
        ({"method": "SCAFFOLD", "mode": "buffered", "buffer_size": 2}, "mode"),
        ({"method": "SCAFFOLD", "late_updates": "next_round"}, "late_updates"),
        ({"method": "IIADMM", "late_updates": "next_round"}, "late_updates"),
        ({"method": "ICEADMM", "late_updates": "next_round"}, "late_updates"),
    ],
)  # fmt: skip
def test_modes_that_do_not_fit_are_refused_with_a_pointer(options, pointer) -> None:
    with pytest.raises(Invalid) as refusal:
        scene("a", "b", started=False, **options)

    assert [error["pointer"] for error in refusal.value.data["errors"]] == [f"/options/{pointer}"]


class EveryUpdateCountsOnce(TestCase):
    """Any interleaving of three clients, failures, deadlines and workers."""

    @settings(max_examples=8, deadline=None)
    @given(
        steps=st.lists(st.sampled_from(["a", "b", "c", "fail", "work", "deadline"]), max_size=25),
        k=st.integers(1, 3),
    )
    def test_whatever_happens_every_acknowledged_update_counts_exactly_once(self, steps, k) -> None:
        running = buffered("a", "b", "c", k=k, rounds=6)
        acknowledged = 0
        for number, step in enumerate(steps):
            if running.now.state != "O":
                break
            if step == "work":
                running.work()
            elif step == "deadline":
                Round.objects.filter(deadline__isnull=False).update(deadline=timezone.now())
                sweep()
            else:
                acknowledged += self._act(running, step, number)
        while running.work():  # what waited may fill the next buffer at once
            pass

        ended = running.now.state != "O"
        states = list(LocalModel.objects.values_list("state", flat=True))
        assert len(states) == acknowledged
        assert set(states) <= {"consumed", "accepted", "received"}
        versions = ModelVersion.objects.filter(model=running.now.model, number__gt=0)
        assert sum(version.num_updates for version in versions) == states.count("consumed")
        if not ended:
            assert running.round.phase in {RoundPhase.NOTIFYING, RoundPhase.COLLECTING}
            assert running.round.deadline is not None

    @staticmethod
    def _act(running: Scene, step: str, number: int) -> int:
        site = "abc"[number % 3] if step == "fail" else step
        answer = task_next(user=running.sites[site])
        if answer["state"] != "task":
            return 0
        if step == "fail":
            task = Task.objects.get(pk=answer["task"]["id"])
            task_failure(task=task, user=running.sites[site], code="X", text="")
            return 0
        try:
            running.send(site, float(number), round=answer["task"]["round"])
        except Conflict:
            return 0
        return 1
