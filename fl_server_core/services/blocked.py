"""What a training waits for: computed from its rows, in data and in one sentence."""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from statistics import median
from typing import Any

from django.conf import settings
from django.utils import timezone

from fl_server_core.lifecycle import (
    OPEN_PHASES,
    EventState,
    RoundPhase,
    TaskKind,
    TaskState,
    TrainingState,
)
from fl_server_core.models import LocalModel, Round, Task, TrainerEvent, Training, User
from fl_server_core.selectors.parts import Part, part_of, told_at
from fl_server_core.selectors.visibility import is_admin, users_visible_to
from fl_server_core.services.asking import eligible_now
from fl_server_core.services.clients import training_missing
from fl_server_core.services.requirements import Lack
from fl_server_core.services.round_policy import Step, are_needed, decide, policy_of
from fl_server_core.services.rounds import current_round, round_end, round_standing, updates_held
from fl_server_core.services.trainings import participants_active

WHO_TOLD, WHO_NAMED = 100, 5
UNREADY = "unready"  # has not joined with all that the training requires
LOOKED_BACK = 5  # rounds
ASKED: Mapping[str, tuple[TaskKind, str, str]] = {
    RoundPhase.NOTIFYING: (TaskKind.TRAIN, "UPDATES", "updates"),
    RoundPhase.COLLECTING: (TaskKind.TRAIN, "UPDATES", "updates"),
    RoundPhase.SWAG: (TaskKind.SWAG, "MOMENTS", "SWAG moments"),
    RoundPhase.TESTING: (TaskKind.EVALUATE, "METRICS", "test results"),
}


@dataclass(frozen=True)
class Who:
    """Somebody who is waited for. `name` is empty, and the last two null, where one may not know them.

    `state` is a `Part`, "unready" or "actor".
    """

    user: uuid.UUID
    name: str
    state: str
    last_seen: datetime | None = None
    progress: dict[str, Any] | None = None


@dataclass(frozen=True)
class Blocked:
    """`until` is when something happens by itself (`then`); `eta` is a guess from progress and past rounds."""

    code: str
    since: datetime | None
    text: str
    until: datetime | None = None
    then: str = ""
    who: list[Who] = field(default_factory=list)
    eta: datetime | None = None


def blocked_on(*, training: Training, visible_to: User) -> Blocked | None:
    """What it waits for now; None once it is complete or cancelled."""
    look = _Look(training, visible_to)
    if training.state == TrainingState.INITIAL:
        return look.start()
    if training.state == TrainingState.ERROR:
        return look.error()
    if training.state in {TrainingState.COMPLETED, TrainingState.CANCELLED}:
        return None
    round = current_round(training)
    if round is None:
        return look.server(training.started_at)
    round.training = training
    if training.state == TrainingState.PAUSED:
        return look.pause(round)
    work = round.events.filter(state__in=[EventState.PENDING, EventState.RUNNING]).first()
    if work is not None:
        return look.work(round, work)
    return (
        look.parts(round)
        or look.quarantine(round)
        or look.sites(round)
        or look.server(round.started_at)
    )


class _Look:
    def __init__(self, training: Training, viewer: User) -> None:
        self.training, self.viewer, self.now = training, viewer, timezone.now()
        self.insider = is_admin(viewer) or viewer.pk == training.actor_id

    def start(self) -> Blocked:
        since = self.training.created_at
        if not participants_active(self.training):
            said = "No client is in it yet: PUT trainings/<id>/clients/, then start it."
            return Blocked("NO_PARTICIPANTS", since, said, who=self._people([self.training.actor]))
        said = "It has not been started: POST trainings/<id>/start/."
        return Blocked("NOT_STARTED", since, said, who=self._people([self.training.actor]))

    def error(self) -> Blocked:
        said = f"{self.training.reason.rstrip('.')}. Retry it (POST trainings/<id>/retry/), or delete it."
        who = self._people([self.training.actor])
        return Blocked("ERROR", self.training.finished_at, said, who=who)

    def server(self, since: datetime | None) -> Blocked:
        """Nothing to wait for: a commit is a moment old, or nobody sweeps."""
        seconds = settings.FL_SWEEP_SECONDS
        said = f"Nothing is missing: the server goes on within {seconds} s; else is its clock (beat) running?"
        return Blocked(
            "SERVER", since, said, until=self.now + timedelta(seconds=seconds), then="it goes on"
        )

    def pause(self, round: Round) -> Blocked:
        by = self.training.steered_by
        who = self._people([by] if by else [])
        named = f" by {who[0].name}" if who and who[0].name else ""
        said = f"Paused{named} in round {round.number} ({round.phase})."
        asked = ASKED.get(round.phase)
        if asked:
            standing = round_standing(round, asked[0])
            said += f" {standing.done} of {standing.asked} {asked[2]} are in, more are taken."
        said += " Go on: POST trainings/<id>/resume/."
        return Blocked("PAUSED", self.training.steered_at, said, who=who)

    def work(self, round: Round, work: TrainerEvent) -> Blocked:
        what = f"{work.type} of round {round.number}"
        times = (
            f"attempt {work.attempt}, {work.failures} of {settings.FL_EVENT_ATTEMPTS} have failed"
        )
        eta = self._work_eta(work)
        error = f" ({work.error[:200]})" if work.error and self.insider else ""
        if work.state == EventState.PENDING and (shared := self._shared(work, what)):
            return shared
        if work.state == EventState.RUNNING and work.lease_until and work.lease_until > self.now:
            said = f"A worker is at {what}: {times}."
            then = "another worker takes over, if this one is silent until then"
            return Blocked("WORKER", work.created_at, said, work.lease_until, then, eta=eta)
        if work.state == EventState.RUNNING:
            said = f"The worker of {what} is gone; another one takes over: {times}."
            return Blocked("WORKER_LOST", work.created_at, said, then="it is tried again")
        if work.lease_until and work.lease_until > self.now:
            said = f"{what} failed{error} and is tried again at {clock(work.lease_until)}: {times}."
            then = "it is tried again"
            return Blocked("WORKER_RETRY", work.created_at, said, work.lease_until, then)
        said = (
            f"{what} waits for a worker since {ago(self.now - work.created_at)}; if that lasts, is one "
            "running?"
        )
        return Blocked("WORKER_QUEUED", work.created_at, said, eta=eta)

    def _shared(self, work: TrainerEvent, what: str) -> Blocked | None:
        """How far the slices are that all workers make; None if there are none, or all are made."""
        slices = list(work.slices.all())
        left = [one for one in slices if one.state != EventState.DONE]
        if not left:
            return None
        at_work = [one for one in left if one.lease_until and one.lease_until > self.now]
        busy = sum(one.state == EventState.RUNNING for one in at_work)
        said = (
            f"All workers share {what}: {len(slices) - len(left)} of {len(slices)} slices are made, "
            f"{busy} are being made."
        )
        if error := next((one.error for one in left if one.error), ""):
            said += " Some are tried again" + (f" ({error[:200]})." if self.insider else ".")
        code = "WORKER" if at_work else "WORKER_QUEUED"
        return Blocked(code, work.created_at, said, then="a silent worker's slice goes to another")

    def parts(self, round: Round) -> Blocked | None:
        kind, code, noun = ASKED.get(round.phase, (None, "", ""))
        if kind is None:
            return None
        if round.phase in OPEN_PHASES and self.training.model.awaits_weights:
            kind, code, noun = TaskKind.INITIAL_WEIGHTS, "INITIAL_WEIGHTS", "initial weights"
        asked = Task.objects.filter(kind=kind, round__training=self.training, state=TaskState.OPEN)
        if not (kind == TaskKind.TRAIN and policy_of(round.policy).buffered):
            asked = asked.filter(round=round)  # else parts outlive their rounds
        tasks = list(asked.select_related("user").prefetch_related("notifications"))
        standing = round_standing(round, kind)
        if not tasks:
            return None
        until, then = round_end(round, kind), self._then(round, kind)
        who = self._parts(tasks)
        named = ", ".join(self._describe(one) for one in who[:WHO_NAMED])
        more = f" and {len(tasks) - WHO_NAMED} more" if len(tasks) > WHO_NAMED else ""
        of = standing.done + len(tasks)
        said = f"Round {round.number} waits for {len(tasks)} of {of} {noun}: {named}{more}."
        if until:
            said += f" At {clock(until)}, {then}."
        if standing.held:
            said += f" {self._held(round)}"
        since = min(task.created_at for task in tasks)
        eta = self._parts_eta(round, kind, tasks)
        if eta and until:
            eta = min(eta, until)
        return Blocked(code, since, said, until, then, who, eta)

    def quarantine(self, round: Round) -> Blocked | None:
        """All have answered, and somebody has to decide on what is in quarantine."""
        held = updates_held(round) if round.phase in OPEN_PHASES else LocalModel.objects.none()
        first = held.order_by("created_at").first()
        if first is None:
            return None
        until, then = round_end(round, TaskKind.TRAIN), self._then(round, TaskKind.TRAIN)
        said = f"Round {round.number} waits for a decision. {self._held(round)}"
        if until:
            said += f" At {clock(until)}, {then}."
        who = self._people([self.training.actor])
        return Blocked("QUARANTINE", first.created_at, said, until, then, who)

    def _held(self, round: Round) -> str:
        held = updates_held(round).order_by("created_at", "id")
        names = self._names(list(held.values_list("owner_id", flat=True)))
        whose = [names.get(update.owner_id) or str(update.owner_id) for update in held[:WHO_NAMED]]
        more = held.count() - len(whose)
        named = ", ".join(whose) + (f" and {more} more" if more else "")
        return (
            f"In quarantine is what {named} sent: the actor or an admin can release or refuse it "
            "(POST updates/<id>/release/ or updates/<id>/refuse/; in the admin: Local models)."
        )

    def sites(self, round: Round) -> Blocked | None:
        """An open round in which nobody could be asked yet, or nobody else."""
        if round.phase not in OPEN_PHASES or round.deadline is None:
            return None
        members, there = eligible_now(round)
        absent = [user for user in members if user not in there]
        lacking = {missing.user.pk: missing.lack for missing in training_missing(self.training)}
        who = [self._absent(user, user.pk in lacking) for user in absent[:WHO_TOLD]]
        named = ", ".join(self._describe(one, lacking.get(one.user)) for one in who[:WHO_NAMED]) + (
            f" and {len(absent) - WHO_NAMED} more" if len(absent) > WHO_NAMED else ""
        )
        then = self._then_asked(round, there)
        said = f"Round {round.number} waits for sites that may be asked: {len(there)} of {len(members)} may"
        said += f", missing {named}." if named else "."
        said += f" At {clock(round.deadline)}, {then}."
        return Blocked("SITES", round.started_at, said, round.deadline, then, who)

    def _absent(self, user: User, lacks: bool) -> Who:
        own = self.insider or user.pk == self.viewer.pk
        name = self._names([user.pk]).get(user.pk, "")
        state = UNREADY if lacks else Part.OFFLINE.value
        return Who(user.pk, name, state, user.last_seen_at if own else None)

    def _then_asked(self, round: Round, there: Sequence[User]) -> str:
        policy = policy_of(round.policy)
        if policy.failure_policy == "wait":
            return "it goes on waiting"
        if self.training.model.awaits_weights:
            return "it ends in ERROR (nobody has sent initial weights)"
        here = {str(user.pk) for user in there}
        asked = round.tasks.filter(kind=TaskKind.TRAIN).exists()
        if not asked and len(there) >= policy.min_updates and here.issuperset(policy.required):
            return "those who may be asked then are asked"
        return self._then(round, TaskKind.TRAIN)

    def _then(self, round: Round, kind: TaskKind) -> str:
        policy, standing = policy_of(round.policy), round_standing(round, kind)
        if kind == TaskKind.INITIAL_WEIGHTS:
            return "another participant is asked for them"
        if kind == TaskKind.EVALUATE:
            arrived = (
                f"with the {standing.done} results that are in" if standing.done else "without any"
            )
            return f"it goes on {arrived}"
        step, reason = decide(policy, replace(standing, overdue=True))
        if step in {Step.AGAIN, Step.EXTEND}:
            return "those who are missing are asked again"
        if step == Step.FAIL:
            return f"it ends in ERROR ({reason or are_needed(policy.min_updates)})"
        if step == Step.SKIP:
            return "the round is skipped and the model stays as it is"
        return f"it goes on with the {standing.done} that are in"

    def _parts(self, tasks: Sequence[Task]) -> list[Who]:
        shown = tasks[:WHO_TOLD]
        names = self._names([task.user_id for task in shown])
        found = []
        for task in shown:
            own = self.insider or task.user_id == self.viewer.pk
            found.append(
                Who(
                    task.user_id,
                    names.get(task.user_id, ""),
                    part_of(task, self.now).value,
                    task.user.last_seen_at if own else None,
                    task.progress if own else None,
                )
            )
        return found

    def _describe(self, one: Who, lack: Lack | None = None) -> str:
        said = [one.state]
        if lack is not None and self.insider:
            said.append(lack.text)
        step, of = ((one.progress or {}).get(key) for key in ("step", "of"))
        if step is not None:
            said.append(f"{step} of {of}" if of else f"step {step}")
        if one.last_seen is not None and one.state in {Part.OFFLINE, Part.SILENT}:
            said.append(f"last heard from {ago(self.now - one.last_seen)} ago")
        elif one.state in {Part.OFFLINE, Part.SILENT} and self.insider:
            said.append("never heard from")
        return f"{one.name or one.user} ({', '.join(said)})"

    def _people(self, users: Sequence[User]) -> list[Who]:
        names = self._names([user.pk for user in users])
        return [Who(user.pk, names.get(user.pk, ""), "actor") for user in users]

    def _names(self, ids: Sequence[uuid.UUID]) -> dict[uuid.UUID, str]:
        rows = users_visible_to(self.viewer).filter(pk__in=ids)
        return dict(rows.values_list("pk", "username"))

    def _work_eta(self, work: TrainerEvent) -> datetime | None:
        past = TrainerEvent.objects.filter(
            training=self.training, type=work.type, state=EventState.DONE
        ).order_by("-pk")[:LOOKED_BACK]
        took = [e.finished_at - e.created_at for e in past if e.finished_at is not None]
        return self._guess(work.created_at, took)

    def _parts_eta(self, round: Round, kind: TaskKind, tasks: Sequence[Task]) -> datetime | None:
        """When the last one is done, if there is a guess for each."""
        past = Task.objects.filter(
            round__training=self.training, kind=kind, state=TaskState.DONE,
            user__in=[task.user_id for task in tasks],
            round__number__gte=round.number - LOOKED_BACK,
        )  # fmt: skip
        took: dict[uuid.UUID, list[timedelta]] = {}
        for task in past:
            if task.finished_at is not None:
                took.setdefault(task.user_id, []).append(task.finished_at - task.created_at)
        guesses = [
            self._by_progress(task) or self._guess(task.created_at, took.get(task.user_id, []))
            for task in tasks
        ]
        known = [guess for guess in guesses if guess is not None]
        return max(known) if len(known) == len(guesses) else None

    def _by_progress(self, task: Task) -> datetime | None:
        told, beat = told_at(task), task.progress_at
        step, of = ((task.progress or {}).get(key) for key in ("step", "of"))
        if not told or not beat or not step or not of or beat <= told:
            return None
        spent = (beat - told).total_seconds() * max(1.0, of / step)
        return told + timedelta(seconds=spent) if spent < 31_536_000 else None

    def _guess(self, begun: datetime, took: Sequence[timedelta]) -> datetime | None:
        """From past times; one that has proved wrong is none."""
        if not took:
            return None
        guess = begun + timedelta(seconds=median(t.total_seconds() for t in took))
        return guess if guess > self.now else None


def ago(span: timedelta) -> str:
    """A length of time for people: "40 s", "3 min", "5 h", "2 days"."""
    seconds = max(0, int(span.total_seconds()))
    if seconds < 120:
        return f"{seconds} s"
    if seconds < 7_200:
        return f"{seconds // 60} min"
    if seconds < 172_800:
        return f"{seconds // 3_600} h"
    return f"{seconds // 86_400} days"


def clock(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC"
