"""A model check of trainings: whatever happens in whatever order, nothing gets stuck, lost or counted twice.

Hypothesis draws the order; each step is one thing that a site, a researcher, a worker or time may do. What the
services refuse is fine; what they leave behind is checked after every step.
"""

from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
from django.db import transaction
from django.db.models import Sum
from django.utils import timezone
from hypothesis import HealthCheck, Phase, assume, settings
from hypothesis import strategies as some
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from safetensors.numpy import load, save

from fl_server_ai.services import controls
from fl_server_ai.services.joining import client_join, initial_submit
from fl_server_ai.services.moments import moments_submit
from fl_server_ai.services.reconciler import sweep
from fl_server_ai.services.tasks import task_failure, task_next, task_progress
from fl_server_ai.services.trainings import training_clients_remove, training_start
from fl_server_ai.trainer.events import EVENTS
from fl_server_ai.trainer.model_trainer import ModelTrainer
from fl_server_ai.trainer.tasks import process_trainer_task
from fl_server_core.exceptions import AggregationException, DomainError, Invalid
from fl_server_core.lifecycle import (
    OPEN_PHASES,
    TERMINAL_TRAINING_STATES,
    EventState,
    TaskKind,
    TaskState,
    TrainingState,
    UpdateState,
)
from fl_server_core.models import (
    GlobalModel,
    LocalModel,
    Round,
    SwagMoments,
    Task,
    TrainerEvent,
    Training,
)
from fl_server_core.services.blocked import blocked_on
from fl_server_core.services.events import event_claim
from fl_server_core.services.lateness import COUNTED
from fl_server_core.services.trainings import participants_active, training_add_clients
from fl_server_core.storage import local_path
from tests.scenes import Scene, scene, staged, weights

pytestmark = pytest.mark.django_db
SITES = ("ada", "grace", "joan")
HOUR = timedelta(hours=1)
AGEING = ("created_at", "started_at", "deadline", "not_before", "progress_at", "steered_at")
UNFINISHED = [EventState.PENDING, EventState.RUNNING]
RUNNING = {TrainingState.ONGOING, TrainingState.SWAG_ROUND}
sites, values, samples = some.sampled_from(SITES), some.integers(0, 9), some.integers(1, 4)


def consistent(options: dict[str, Any], uncertainty: str) -> dict[str, Any]:
    """Options without what they contradict, so that most draws are trainings."""
    found = dict(options)
    chained = "daisy_chain_period" in found
    if chained:
        found.pop("mode", None)
        found.pop("late_updates", None)
    buffered = found.get("mode") in {"buffered", "async"}
    if chained or found["failure_policy"] == "wait":
        found.pop("at_deadline", None)
    if buffered:
        found.pop("sampling", None)
        found.pop("required", None)
        found["buffer_size"] = 2 if found["mode"] == "buffered" else 1
        found["method"] = "FedAsync" if found["mode"] == "async" else "FedAvg"
    if chained or uncertainty == "SWAG":  # no round of these can be skipped
        if found.get("sampling") == "poisson":
            found.pop("sampling")
        if found.get("at_deadline") == "skip":
            found.pop("at_deadline")
    if found.get("sampling") == "poisson":
        found["client_fraction"] = 0.5
    elif "sampling" in found:
        found["clients_per_round"] = 2
    if {"sampling", "buffer_size"} & found.keys():
        found["min_updates"] = min(found.get("buffer_size", 2), 2, found["min_updates"])
    return found


def opened(*, start: bool, uncertainty: str, **options: Any) -> Scene:
    """A scene whose model may wait for its weights, and whose first site may be required."""
    weightless, required = options.pop("weightless", False), options.pop("required", False)
    running = scene(*SITES, started=False, uncertainty=uncertainty, **options)
    GlobalModel.objects.filter(pk=running.model.pk).update(awaits_weights=weightless)
    if required:
        running.training.options["required"] = [str(running.sites[SITES[0]].pk)]
        running.training.save()
    if start:
        training_start(training=running.training, user=running.actor)
    running.training.refresh_from_db()
    return running


class Trainings(RuleBasedStateMachine):
    """One training, three sites, any number of workers."""

    running: Scene

    def __init__(self) -> None:
        super().__init__()
        self.undo = transaction.atomic()
        self.undo.__enter__()
        self.acknowledged: dict[Any, tuple[int, int]] = {}
        self.claims: list[TrainerEvent] = []

    @initialize(
        rounds=some.integers(1, 2),
        uncertainty=some.sampled_from(["NONE", "NONE", "SWAG"]),
        options=some.fixed_dictionaries(
            {
                "min_updates": some.integers(1, 3),
                "skip_model_tests": some.booleans(),
                "failure_policy": some.sampled_from(["drop", "wait", "fail"]),
            },
            optional={
                "daisy_chain_period": some.just(2),
                "at_deadline": some.sampled_from(["extend", "skip", "fail"]),
                "buffer_size": some.just(2),
                "mode": some.sampled_from(["sync", "buffered", "async"]),
                "late_updates": some.just("next_round"),
                "sampling": some.sampled_from(["fixed", "sticky", "round_robin", "poisson"]),
                "require": some.just({"ready": True}),
                "required": some.just(value=True),
                "weightless": some.just(value=True),
            },
        ),
        start=some.sampled_from([True, True, True, False]),
    )
    def create(self, rounds: int, uncertainty: str, options: dict[str, Any], start: bool) -> None:
        self.chained = "daisy_chain_period" in options
        options = consistent(options, uncertainty)
        self.stale = {"mode", "late_updates"} & options.keys()
        self.skips = options.get("at_deadline") == "skip"
        self.buffered = options.get("mode") in {"buffered", "async"}
        self.checked: set[int] = set()
        with suppress(Invalid):  # options that contradict each other: nothing to check
            self.running = opened(
                rounds=rounds, start=start, uncertainty=uncertainty, round_deadline=3_600, **options
            )
        assume(hasattr(self, "running"))

    def attempt(self, act: Callable[[], Any]) -> Any:
        """Refusals are answers too, and leave nothing behind."""
        with suppress(DomainError), transaction.atomic():
            return act()

    # --- the researcher ---

    @rule()
    def start(self) -> None:
        self.attempt(
            lambda: training_start(training=self.running.training, user=self.running.actor)
        )

    @rule(verb=some.sampled_from(["pause", "resume", "pause", "resume", "retry", "cancel"]))
    def steer(self, verb: str) -> None:
        act = getattr(controls, f"training_{verb}")
        self.attempt(lambda: act(training=self.running.training, user=self.running.actor))

    @rule(seconds=some.sampled_from([1.0, 90_000.0]))
    def extend(self, seconds: float) -> None:
        self.attempt(
            lambda: controls.round_extend(
                training=self.running.training, user=self.running.actor, seconds=seconds
            )
        )

    @rule(site=sites)
    def remove(self, site: str) -> None:
        clients = [self.running.sites[site].pk]
        self.attempt(
            lambda: training_clients_remove(
                training=self.running.training, user=self.running.actor, clients=clients
            )
        )

    @rule(site=sites)
    def admit(self, site: str) -> None:
        clients = [self.running.sites[site].pk]
        self.attempt(
            lambda: training_add_clients(
                training=self.running.training, user=self.running.actor, clients=clients
            )
        )

    # --- the sites ---

    @rule(site=sites, value=values, samples=samples)
    def answer(self, site: str, value: int, samples: int) -> None:
        """Do what `GET tasks/` says."""
        said = task_next(user=self.running.sites[site])
        if said["state"] == "task":
            kind, number = said["task"]["kind"], said["task"]["round"]
            acts = {"train": self.update, "swag": self.moments, "evaluate": self.report}
            {**acts, "initial_weights": self.begin}[kind](site, value, samples, number)

    @rule(site=sites, value=values, samples=samples, number=some.integers(0, 2))
    def update(self, site: str, value: int, samples: int, number: int) -> None:
        receipt = self.attempt(lambda: self.running.send(site, float(value), samples, number))
        if receipt is not None and receipt.created:
            assert receipt.update.pk not in self.acknowledged
            self.acknowledged[receipt.update.pk] = (value, samples)

    @rule(site=sites)
    def join(self, site: str) -> None:
        """A site says that it has what trainings may require."""
        client_join(
            user=self.running.sites[site], capabilities=["train"], attributes={"ready": True},
            sdk_version="1", num_examples=1,
        )  # fmt: skip

    def begin(self, site: str, value: int, samples: int, number: int) -> None:
        task, file = self.running.task(site, "initial_weights"), staged(save(weights(float(value))))
        owner = self.running.sites[site]
        self.attempt(lambda: initial_submit(task=task, owner=owner, file=file, sha256=None))

    def report(self, site: str, value: int, samples: int, number: int) -> None:
        self.attempt(lambda: self.running.report(site, {"loss": float(value)}, samples))

    def moments(self, site: str, value: int, samples: int, number: int) -> None:
        means = {k: v for k, v in weights(float(value)).items() if k != "steps"}
        squares = {name: array * array for name, array in means.items()}
        self.attempt(
            lambda: moments_submit(
                model_id=self.running.training.model_id, owner=self.running.sites[site],
                round=number, sample_size=samples, first=staged(save(means)),
                second=staged(save(squares)),
            )
        )  # fmt: skip

    @rule(site=sites, fails=some.booleans())
    def tell(self, site: str, fails: bool) -> None:
        """Progress, or a failure, of the newest task whatever became of it."""
        user = self.running.sites[site]
        task = Task.objects.filter(user=user).order_by("-created_at").first()
        if task is None:
            return
        if fails:
            self.attempt(lambda: task_failure(task=task, user=user, code="OOM", text=""))
        else:
            self.attempt(lambda: task_progress(task=task, user=user, step=1, of=2))

    # --- the workers, the clock ---

    @rule()
    def work(self) -> None:
        for event in TrainerEvent.objects.filter(state__in=UNFINISHED):
            process_trainer_task(event.pk)  # if nobody else has it

    @rule()
    def claim(self) -> None:
        for event in TrainerEvent.objects.filter(state__in=UNFINISHED):
            held = event_claim(event_id=event.pk)
            if held is not None:
                self.claims.append(held)

    @rule(which=some.integers(0, 3))
    def publish(self, which: int) -> None:
        """A worker comes to its end, however late, whoever has the event by now."""
        if not self.claims:
            return
        work = self.claims[which % len(self.claims)]
        trainer = ModelTrainer(work.training, work=work)
        with suppress(AggregationException, DomainError), transaction.atomic():
            trainer.handle(EVENTS[work.type](trainer))

    @rule()
    def workers_die(self) -> None:
        TrainerEvent.objects.filter(state__in=UNFINISHED).update(lease_until=_past())
        sweep()

    @rule()
    def deadline_passes(self) -> None:
        Round.objects.filter(deadline__isnull=False).update(deadline=_past())
        sweep()

    @rule(reports=some.booleans(), site=sites)
    def an_hour_passes(self, reports: bool, site: str) -> None:
        """All that has happened is an hour older; who reports in the end is not to be called silent."""
        for row in (*Round.objects.all(), *Task.objects.all(), *Training.objects.all()):
            earlier = {
                name: getattr(row, name) - HOUR for name in AGEING if getattr(row, name, None)
            }
            type(row).objects.filter(pk=row.pk).update(**earlier)
        if reports:
            self.tell(site, fails=False)
        sweep()

    @rule()
    def pauses_pass(self) -> None:
        Task.objects.filter(not_before__isnull=False).update(not_before=_past())
        TrainerEvent.objects.filter(state=EventState.PENDING).update(lease_until=None)
        sweep()

    # --- what must be so after every step ---

    @invariant()
    def what_runs_has_an_owner(self) -> None:
        """Work that is due, or an open part with a deadline; what has ended has neither."""
        training = self.running.now
        work = TrainerEvent.objects.filter(state__in=UNFINISHED)
        parts = Task.objects.filter(state=TaskState.OPEN)
        if training.state in RUNNING:
            round = self.running.round
            # Could be asked yet; in asynchronous modes others may be, as long as the round is open.
            trains = round.tasks.filter(kind=TaskKind.TRAIN).exists() and not self.buffered
            nobody = round.phase in OPEN_PHASES and not trains
            asked = parts.filter(round=round).exists()
            assert work.filter(round=round).exists() or (
                (asked or nobody) and round.deadline is not None
            )
        if training.state in TERMINAL_TRAINING_STATES:
            assert not work.exists()
            assert not parts.exists()
        if training.state == TrainingState.PAUSED:
            assert self.running.round.deadline is None

    @invariant()
    def it_says_what_it_waits_for(self) -> None:
        training = self.running.now
        found = blocked_on(training=training, visible_to=self.running.actor)
        if training.state in {TrainingState.COMPLETED, TrainingState.CANCELLED}:
            assert found is None
        else:
            assert found is not None
            assert found.text
            assert found.code != "SERVER"

    @invariant()
    def nothing_acknowledged_is_lost_or_counted_twice(self) -> None:
        kept = LocalModel.objects.in_bulk()
        assert set(kept) == set(self.acknowledged)
        fine = {UpdateState.ACCEPTED, UpdateState.CONSUMED}
        if self.stale or self.skips:  # an update may wait for the next round, or become too old
            fine |= {UpdateState.RECEIVED, UpdateState.REFUSED}
        assert {update.state for update in kept.values()} <= fine
        assert all(u.blob_id for u in kept.values() if u.state == UpdateState.ACCEPTED)
        if self.chained:
            return
        for round in Round.objects.exclude(result_version=None).exclude(pk__in=self.checked):
            self.checked.add(round.pk)
            updates = LocalModel.objects.filter(round=round, state__in=COUNTED)
            assert {update.state for update in updates} == {UpdateState.CONSUMED}
            version = round.result_version
            assert version.num_updates == len(updates)
            assert version.total_examples == updates.aggregate(total=Sum("sample_size"))["total"]
            if self.stale:
                continue
            sent = [self.acknowledged[update.pk] for update in updates]
            with local_path(version.blob) as path:
                found = load(path.read_bytes())["layer.bias"]
            np.testing.assert_allclose(
                found, np.average([v for v, _ in sent], weights=[n for _, n in sent]), rtol=1e-6
            )
        merged = LocalModel.objects.filter(state=UpdateState.CONSUMED)
        assert not merged.filter(round__result_version=None).exists()

    # --- and in the end ---

    def teardown(self) -> None:
        """From wherever it is, it comes to an end if time passes, sites answer and workers work."""
        try:
            if hasattr(self, "running"):
                self.steer("resume")
                self.start()
                self.comes_to_an_end()
        finally:
            transaction.set_rollback(True)
            self.undo.__exit__(None, None, None)

    def comes_to_an_end(self) -> None:
        for site in SITES:
            self.join(site)
        for turn in range(40):
            if self.running.now.state in {*TERMINAL_TRAINING_STATES, TrainingState.INITIAL}:
                break
            for site in SITES:
                self.answer(site, turn % 10, 1)
            self.work()
            self.pauses_pass()
            TrainerEvent.objects.filter(state=EventState.RUNNING).update(lease_until=_past())
            if turn > 4:
                self.deadline_passes()
        training = self.running.now
        if training.state == TrainingState.INITIAL:  # it needs more clients
            members = {str(user.pk) for user in participants_active(training)}
            needed = set(training.options.get("required", ()))
            assert len(members) < training.options["min_updates"] or not needed <= members
        else:
            assert training.state in TERMINAL_TRAINING_STATES
        self.what_runs_has_an_owner()
        self.nothing_acknowledged_is_lost_or_counted_twice()
        assert not SwagMoments.objects.filter(round__phase="swag").exists()


def _past() -> Any:
    return timezone.now() - timedelta(seconds=1)


def check(examples: int, steps: int, *, derandomize: bool) -> None:
    run_state_machine_as_test(
        Trainings,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            derandomize=derandomize,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_no_order_of_events_leaves_a_training_stuck_or_an_update_lost() -> None:
    check(7, 20, derandomize=True)


@pytest.mark.heavy
@pytest.mark.timeout(7_200)
def test_no_order_of_events_among_many_leaves_a_training_stuck() -> None:
    check(1_000, 50, derandomize=False)
