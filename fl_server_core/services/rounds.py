"""Rounds: opening one, taking in updates and test results, and what its rows say about it.

Every function that writes expects the training's row to be locked by the caller's transaction
(`training_locked`), and leaves the question "does it go on now?" to `fl_server_ai.services.rounds`.
"""

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from django.db.models import Q, QuerySet
from django.db.models.functions import Coalesce
from django.utils import timezone

from fl_server_core.exceptions import DuplicateUpdate, NotPermitted, RoundClosed, Unusable
from fl_server_core.lifecycle import (
    OPEN_PHASES,
    NotificationState,
    RoundPhase,
    TaskKind,
    TaskState,
    TrainingState,
    UpdateState,
    move,
    move_all,
)
from fl_server_core.models import (
    Blob,
    GlobalModel,
    LocalModel,
    Metric,
    Notification,
    Participant,
    Round,
    Task,
    Training,
    User,
)
from fl_server_core.models.notifications import NotificationType
from fl_server_core.selectors.gaps import ROUND_FULL
from fl_server_core.selectors.parts import UPDATE_REFUSED, told_at
from fl_server_core.services.heartbeats import phase_end
from fl_server_core.services.lateness import late_task
from fl_server_core.services.metrics import Value, metrics_record, metrics_stored
from fl_server_core.services.notifications import notifications_queue
from fl_server_core.services.round_policy import (
    RoundPolicy,
    Standing,
    pause_before,
    policy_of,
)
from fl_server_core.services.trainings import participants_active, participants_here

MAX_SAMPLES = 2**31
RUNNING = frozenset({TrainingState.ONGOING, TrainingState.PAUSED})
NOW = {
    RoundPhase.AGGREGATING: "round {} is being aggregated",
    RoundPhase.SWAG: "round {} collects SWAG moments",
    RoundPhase.TESTING: "the model of round {} is being tested",
    RoundPhase.DONE: "round {} is over, and the next has not begun",
    RoundPhase.FAILED: "round {} has failed",
    RoundPhase.SKIPPED: "round {} was skipped",
}
SAMPLES_ARE = f"it is how many examples were trained on, 1 to {MAX_SAMPLES}"
OUT = (UpdateState.REFUSED, UpdateState.QUARANTINED)
MESSAGES = {
    TaskKind.TRAIN: NotificationType.UPDATE_ROUND_START,
    TaskKind.SWAG: NotificationType.SWAG_ROUND_START,
    TaskKind.EVALUATE: NotificationType.MODEL_TEST_ROUND,
    TaskKind.INITIAL_WEIGHTS: NotificationType.INITIAL_WEIGHTS,
}
# By the participant's id, the update that he goes on from; None: the global model.
Starts = Mapping[uuid.UUID, LocalModel | None]


@dataclass(frozen=True)
class Tally:
    """How a round's tasks of one kind stand: counted from rows at every question."""

    open: int
    done: int
    total: int
    cancelled: int = 0  # as the parts of those whose update is in quarantine are


def round_tally(round: Round, kind: TaskKind) -> Tally:
    """Count a round's tasks of `kind`."""
    states = list(round.tasks.filter(kind=kind).values_list("state", flat=True))
    policy = policy_of(round.policy)
    if kind == TaskKind.TRAIN and policy.takes_late:
        return _tally_with_late(round, policy, states)
    return Tally(
        open=states.count(TaskState.OPEN),
        done=states.count(TaskState.DONE),
        total=len(states),
        cancelled=states.count(TaskState.CANCELLED),
    )


def _tally_with_late(round: Round, policy: RoundPolicy, states: list[str]) -> Tally:
    """The same where updates count in later rounds: what is in are updates, not parts."""
    counted = [UpdateState.ACCEPTED, UpdateState.CONSUMED]
    done = LocalModel.objects.filter(round=round, state__in=counted).count()
    waiting = states.count(TaskState.OPEN)
    if policy.buffered:
        waiting = Task.objects.filter(
            round__training=round.training_id, kind=TaskKind.TRAIN, state=TaskState.OPEN
        ).count()
    lost = states.count(TaskState.FAILED) + states.count(TaskState.EXPIRED)
    return Tally(open=waiting, done=done, total=done + waiting + lost)


def current_round(training: Training) -> Round | None:
    """The newest round, whatever its phase."""
    return training.rounds.select_related("result_version").order_by("-number").first()


def tasks_ask(
    round: Round,
    users: Sequence[User],
    kind: TaskKind,
    number: int,
    type: NotificationType,
    starts: Starts | None = None,
) -> list[Task]:
    """Give each user a task and queue the message that says so. Repeating it adds nothing."""
    known = set(round.tasks.filter(kind=kind).values_list("user_id", flat=True))
    Task.objects.bulk_create(
        [
            Task(
                round=round,
                user=user,
                kind=kind,
                number=number,
                continues=starts.get(user.pk) if starts else None,
            )
            for user in users
            if user.pk not in known
        ]
    )
    tasks = list(round.tasks.filter(kind=kind))
    notifications_queue(
        training=round.training, type=type, receivers=users, round=number, tasks=tasks
    )
    return tasks


def evaluation_open(*, round: Round, seconds: float | None) -> None:
    """Ask everybody who is in to evaluate the round's result; the number is the one after the increment."""
    training = round.training
    move(round, RoundPhase.TESTING, deadline=deadline_in(seconds))
    users = participants_active(training)
    tasks_ask(
        round,
        users,
        TaskKind.EVALUATE,
        training.model.round,
        NotificationType.MODEL_TEST_ROUND,
    )


def deadline_in(seconds: float | None) -> datetime | None:
    """So many seconds from now; None is no deadline."""
    return None if seconds is None else timezone.now() + timedelta(seconds=seconds)


def membership_check(*, training: Training, user: User) -> None:
    """Raise `NotPermitted` unless the user takes part now."""
    if not Participant.objects.filter(training=training, user=user, removed_at=None).exists():
        raise NotPermitted(
            "you do not take part in this training; its actor can add you", code="NOT_PARTICIPANT"
        )


def sample_size_check(sample_size: int) -> None:
    """Raise `Unusable` (SAMPLE_SIZE): it is a weight in a mean, so nothing and less can't be one."""
    if not 1 <= sample_size <= MAX_SAMPLES:
        raise Unusable(
            f"sample_size is {sample_size}; {SAMPLES_ARE}",
            code="SAMPLE_SIZE",
        )


@dataclass(frozen=True)
class Beside:
    """What came with an update's weights; blobs are unsaved, `digest` covers all but the base version."""

    digest: str = ""
    num_steps: int | None = None
    base_version: int | None = None
    numbers: Mapping[str, float] = field(default_factory=dict)
    extras: Blob | None = None
    tensors: Sequence[str] | None = None
    mask: Blob | None = None

    @property
    def blobs(self) -> list[Blob]:
        return [blob for blob in (self.extras, self.mask) if blob is not None]


def update_replayed(
    *, training: Training, owner: User, number: int, sample_size: int, digest: str, beside: str = ""
) -> LocalModel | None:
    """The stored update if this is the same one again: that is fine at any time, however late."""
    return LocalModel.objects.filter(
        Q(trained_in__number=number) | Q(trained_in=None, round__number=number),
        training=training,
        owner=owner,
        digest=digest,
        sample_size=sample_size,
        beside_digest=beside,
    ).first()


def _closed(training: Training, round: Round | None, number: int) -> str:
    said = f"the training is at round {training.model.round}"
    if round is not None and round.phase in NOW:
        said = NOW[RoundPhase(round.phase)].format(round.number)
    paused = ", and the training is paused" if training.state == TrainingState.PAUSED else ""
    return f"round {number} takes no updates; {said}{paused}: ask for the next task"


def update_check(*, training: Training, owner: User, number: int) -> Task:
    """The open task that an update for this round would finish, or the reason why there is none.

    A pause takes updates: who has worked for hours does not lose them, and the round goes on with them.
    A SWAG round takes late ones, where they count.
    """
    taking = {TrainingState.ONGOING, TrainingState.PAUSED}
    if policy_of(training.options).takes_late:
        taking.add(TrainingState.SWAG_ROUND)
    if training.state not in taking:
        raise RoundClosed(
            f"training {training.pk} is {training.get_state_display()}; it takes no updates",
            code="TRAINING_NOT_RUNNING",
            state=training.state,
        )
    round = current_round(training)
    if round is None or round.number != number or round.phase not in OPEN_PHASES:
        late = round and late_task(training=training, owner=owner, number=number, current=round)
        if late:
            return late
        at = training.model.round
        raise RoundClosed(
            _closed(training, round, number),
            round=at,
            state=training.state,
        )
    task = round.tasks.filter(user=owner, kind=TaskKind.TRAIN).first()
    if task is None:
        raise RoundClosed(
            f"you were not asked in round {number}; you take part from the next one on",
            code="NOT_SELECTED",
            round=number,
        )
    if task.state == TaskState.DONE:
        raise DuplicateUpdate(f"you have already sent another update for round {number}")
    if task.state != TaskState.OPEN:
        late = late_task(training=training, owner=owner, number=number, current=round)
        if late:
            return late
        raise RoundClosed(
            f"your part in round {number} is {task.state}: {task.failure}",
            code="TASK_CLOSED",
            round=number,
        )
    return task


def update_expected(*, training: Training, owner: User, number: int) -> None:
    """The same refusals before the file is read, unless it may be an update that is sent again.

    The lock is not held: `update_accept` asks once more.
    """
    answered = Q(trained_in__number=number) | Q(trained_in=None, round__number=number)
    if not LocalModel.objects.filter(answered, training=training, owner=owner).exists():
        update_check(training=training, owner=owner, number=number)


def update_accept(
    *,
    training: Training,
    owner: User,
    number: int,
    sample_size: int,
    blob: Blob,
    metrics: Mapping[str, Value],
    beside: Beside = Beside(),
    checked: bool = True,
) -> tuple[LocalModel, bool]:
    """Store an update with its metrics; returns it and whether it is new.

    Asked in this order: the same update again is fine, even after the round has moved on; then a
    closed round; then other bytes from the same participant. One that is not `checked` yet waits for a worker.
    """
    sample_size_check(sample_size)
    replay = update_replayed(
        training=training,
        owner=owner,
        number=number,
        sample_size=sample_size,
        digest=blob.digest,
        beside=beside.digest,
    )
    if replay is not None:
        _refuse_again(replay, training)
        return replay, False
    membership_check(training=training, user=owner)
    task = update_check(training=training, owner=owner, number=number)
    for one in (blob, *beside.blobs):
        one.save()
    update = LocalModel.objects.create(
        training=training,
        round=task.round,
        owner=owner,
        sample_size=sample_size,
        digest=blob.digest,
        size=blob.size,
        blob=blob,
        beside_digest=beside.digest,
        num_steps=beside.num_steps,
        base_version=beside.base_version,
        numbers=dict(beside.numbers),
        extras=beside.extras,
        tensors=None if beside.tensors is None else list(beside.tensors),
        mask=beside.mask,
        state=UpdateState.ACCEPTED if checked and _is_collecting(task) else UpdateState.RECEIVED,
        continues=task.continues,
        chain_samples=sample_size + (task.continues.chain_samples if task.continues else 0),
    )
    metrics_record(
        model=training.model,
        local_model=update,
        reporter=owner,
        step=number,
        metrics=metrics,
        sample_size=sample_size,
    )
    if task.state == TaskState.OPEN:
        move(task, TaskState.DONE, finished_at=timezone.now())
    if task.round.phase == RoundPhase.NOTIFYING:
        move(task.round, RoundPhase.COLLECTING)
    return update, True


def _refuse_again(update: LocalModel, training: Training) -> None:
    """A site that was asked again sends the very update that was refused: that attempt ends as the one before did.

    Who has not heard yet that he is asked again has only missed the first answer: it uses up no attempt.
    """
    if update.state != UpdateState.REFUSED:
        return
    task = Task.objects.filter(
        round=update.round_id, user=update.owner_id, kind=TaskKind.TRAIN, state=TaskState.OPEN
    ).first()
    told = None if task is None else told_at(task)
    if task is None or told is None or (task.not_before is not None and told < task.not_before):
        return
    if update.round.phase in OPEN_PHASES:
        task_fail(task=task, code=UPDATE_REFUSED, text=update.reason)
        tasks_retry_refused(update.round, [task])


def tasks_retry_refused(round: Round, failed: Sequence[Task]) -> None:
    """Ask those again whose update was refused, as often as the round's policy says."""
    if round.phase not in OPEN_PHASES or round.training.state not in RUNNING:
        return
    most = policy_of(round.policy).refused_retries
    here = {user.pk for user in participants_active(round.training)}
    again = [task for task in failed if task.attempt <= most and task.user_id in here]
    tasks_ask_again(round, TaskKind.TRAIN, again, lambda task: 0.0)


def updates_consume(updates: Sequence[LocalModel], *, delete: bool) -> list[int]:
    """Say that these were used. With `delete` their files are let go: the ids of what nobody may need now."""
    blobs = [
        pk
        for update in updates
        for pk in (update.blob_id, update.extras_id, update.mask_id)
        if pk is not None
    ]
    gone = {"blob": None, "extras": None, "mask": None}
    move_all(updates, UpdateState.CONSUMED, **(gone if delete else {}))
    return blobs if delete else []


def _is_collecting(task: Task) -> bool:
    """Whether an update for this part counts in the part's own round."""
    return task.state == TaskState.OPEN and task.round.phase in OPEN_PHASES


def evaluation_repeated(
    *, model: GlobalModel, reporter: User, metrics: Mapping[str, Value], number: int | None
) -> bool:
    """Whether these are values of an earlier step, sent again as they were; others are refused.

    Without a number they are of the current step.
    """
    if number is None or number == model.round:
        return False
    if metrics_stored(model=model, reporter=reporter, step=number, metrics=metrics):
        return True
    raise RoundClosed(
        f"the test of round {number} is over; the model is at round {model.round}",
        code="TASK_CLOSED",
        round=model.round,
    )


def evaluation_record(
    *,
    training: Training,
    reporter: User,
    metrics: Mapping[str, Value],
    sample_size: int | None = None,
    number: int | None = None,
) -> None:
    """Store what a participant measured on the current model; ends his test task if he has one.

    Without a sample size, that of his newest update counts. Values that are stored already are fine
    at any time; others are refused once the step's mean stands, or if `number` is another step.
    """
    step = training.model.round
    if evaluation_repeated(model=training.model, reporter=reporter, metrics=metrics, number=number):
        return
    round = current_round(training)
    task = None
    if round is not None and round.phase == RoundPhase.TESTING:
        task = round.tasks.filter(user=reporter, kind=TaskKind.EVALUATE).first()
    if sample_size is None:
        newest = training.local_models.filter(owner=reporter).order_by("-created_at").first()
        sample_size = newest.sample_size if newest else None
    late = Metric.objects.filter(
        model=training.model, step=step, reporter=None, identifier=Metric.AGGREGATED
    ).exists()
    if late and not metrics_stored(
        model=training.model, reporter=reporter, step=step, metrics=metrics
    ):
        raise RoundClosed(f"the metrics of step {step} are already aggregated", round=step)
    if not late:
        metrics_record(
            model=training.model,
            reporter=reporter,
            step=step,
            metrics=metrics,
            sample_size=sample_size,
        )
    if task is not None and task.state == TaskState.OPEN:
        move(task, TaskState.DONE, finished_at=timezone.now())


def task_fail(*, task: Task, code: str, text: str) -> None:
    """End a participant's part in a round; one that has ended already stays as it is."""
    if task.state == TaskState.OPEN:
        move(task, TaskState.FAILED, failure=f"{code}: {text}"[:4000], finished_at=timezone.now())


def round_standing(round: Round, kind: TaskKind) -> Standing:
    """What `decide` looks at. Who has failed and was taken out since is none of those asked any more."""
    tally = round_tally(round, kind)
    end = round_end(round, kind)
    overdue = end is not None and end <= timezone.now()
    return Standing(
        open=tally.open,
        done=tally.done,
        lost=_lost(round, kind).count(),
        overdue=overdue,
        required_missing=_required_missing(round, kind),
        extensions=round.extensions,
        held=updates_held(round).count() if tally.cancelled and kind == TaskKind.TRAIN else 0,
    )


def updates_held(round: Round) -> QuerySet[LocalModel]:
    """Updates in quarantine of participants who are in: a decision on them would still count."""
    return LocalModel.objects.filter(
        round=round,
        state=UpdateState.QUARANTINED,
        owner__in=participants_active(round.training),
    )


def _required_missing(round: Round, kind: TaskKind) -> int:
    """How many of those who are required, and still in, have not delivered."""
    required = policy_of(round.policy).required
    if not required:
        return 0
    here = [user for user in participants_active(round.training) if str(user.pk) in required]
    done = set(
        round.tasks.filter(kind=kind, state=TaskState.DONE).values_list("user_id", flat=True)
    )
    if kind == TaskKind.TRAIN:  # a late update may be what came
        came = round.local_models.exclude(state__in=OUT)
        done |= set(came.values_list("owner_id", flat=True))
    return len({user.pk for user in here} - done)


def round_end(round: Round, kind: TaskKind) -> datetime | None:
    """When the deadline takes effect; later than it says while participants who are at work say so."""
    if round.deadline is None or round.deadline > timezone.now():
        return round.deadline
    policy = policy_of(round.policy)
    outlive = policy.buffered and kind == TaskKind.TRAIN  # parts their rounds
    among = {"round__training": round.training_id} if outlive else {"round": round}
    parts = list(Task.objects.filter(**among, kind=kind, state=TaskState.OPEN))
    begun = [part.not_before or part.created_at for part in parts]
    if outlive:
        begun = [max(round.started_at, since) for since in begun]
    return phase_end(
        deadline=round.deadline,
        asked_at=min(begun, default=round.deadline),
        heartbeats=[part.progress_at for part in parts if part.progress_at is not None],
        extends=policy.progress_extends,
    )


def _lost(round: Round, kind: TaskKind) -> QuerySet[Task]:
    return _unanswered(round, kind, [TaskState.FAILED, TaskState.EXPIRED])


def _unanswered(round: Round, kind: TaskKind, states: Sequence[TaskState]) -> QuerySet[Task]:
    """Parts in these states of participants who are in, and of whom no update counts, or may yet."""
    parts = round.tasks.filter(
        kind=kind, state__in=states, user__in=participants_here(round.training).values("pk")
    )
    if kind != TaskKind.TRAIN:
        return parts
    counted = [UpdateState.ACCEPTED, UpdateState.CONSUMED, UpdateState.QUARANTINED]
    instead = LocalModel.objects.filter(round=round, state__in=counted)
    return parts.exclude(user__in=instead.values("owner"))


def round_extend(round: Round, seconds: float) -> None:
    """Move the deadline for want of updates; this is counted."""
    round.extensions += 1
    round.deadline = deadline_in(seconds)
    round.save(update_fields=["extensions", "deadline"])


def tasks_again(*, round: Round, kind: TaskKind) -> list[Task]:
    """Ask those who failed or were late once more: the same part, its next attempt.

    Who is late is asked at once; who said that it failed after a pause.
    """
    asked = list(_lost(round, kind).select_related("user"))
    tasks_ask_again(round, kind, asked, pause_after)
    return asked


def pause_after(task: Task) -> float:
    """Seconds before somebody is asked again whose part has ended so."""
    return pause_before(task.attempt) if task.state == TaskState.FAILED else 0.0


def tasks_reopen(*, round: Round, kind: TaskKind) -> list[Task]:
    """For a retry: ask everybody at once whose part ended without an answer and who is in; what is done stays.

    So does what is in quarantine. Who was refused may send another update.
    """
    closed = [TaskState.FAILED, TaskState.EXPIRED, TaskState.CANCELLED]
    asked = list(_unanswered(round, kind, closed).select_related("user"))
    tasks_ask_again(round, kind, asked, lambda task: 0.0)
    return asked


def tasks_ask_again(
    round: Round, kind: TaskKind, asked: Sequence[Task], pause: Callable[[Task], float]
) -> None:
    """Open these parts again and queue the messages that say so; `pause(task)` is in seconds."""
    now = timezone.now()
    for task in asked:
        move(
            task,
            TaskState.OPEN,
            attempt=task.attempt + 1,
            not_before=now + timedelta(seconds=pause(task)),
            fetched_at=None,
            finished_at=None,
            progress=None,
            progress_at=None,
        )
    under_way = Notification.objects.filter(task__in=asked, state=NotificationState.QUEUED)
    told = set(under_way.values_list("receiver_id", flat=True))
    for number in {task.number for task in asked if kind in MESSAGES}:
        notifications_queue(
            training=round.training,
            type=MESSAGES[kind],
            receivers=[task.user for task in asked if task.user_id not in told],
            round=number,
            tasks=asked,
        )


def parts_shift(*, training: Training, by: timedelta) -> None:
    """Begin all open parts so much later: the time of a pause is nobody's."""
    open_parts = Task.objects.filter(round__training=training, state=TaskState.OPEN)
    open_parts.update(not_before=Coalesce("not_before", "created_at") + by)


def tasks_expire(*, round: Round) -> None:
    """End all open parts of a round whose deadline has passed."""
    move_all(
        round.tasks.filter(state=TaskState.OPEN),
        TaskState.EXPIRED,
        failure="DEADLINE: nothing arrived in time",
        finished_at=timezone.now(),
    )


def tasks_close(*, round: Round) -> None:
    """End the parts that are still open although the round has all that it wants."""
    move_all(
        round.tasks.filter(state=TaskState.OPEN),
        TaskState.CANCELLED,
        failure=f"{ROUND_FULL}: the round closed with the updates that came first",
        finished_at=timezone.now(),
    )


def tasks_cancel(*, training_id: uuid.UUID, why: str) -> None:
    """End all open parts of a training."""
    move_all(
        Task.objects.filter(round__training=training_id, state=TaskState.OPEN),
        TaskState.CANCELLED,
        failure=why,
        finished_at=timezone.now(),
    )
