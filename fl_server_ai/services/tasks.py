"""What a client is asked to do now: computed from rows at every question, waited for without a connection."""

import json
import time
from dataclasses import asdict, dataclass
from typing import Any

from django.conf import settings
from django.db import connection
from django.db.models import F, Q
from django.utils import timezone

from fl_server_ai.aggregation import STRATEGIES
from fl_server_ai.notifications import wakeups
from fl_server_ai.services.places import place
from fl_server_ai.services.rounds import round_advance
from fl_server_ai.services.training_options import client_config, trainer_options
from fl_server_core.exceptions import Invalid, NotFound
from fl_server_core.killpoints import committing
from fl_server_core.lifecycle import (
    OPEN_PHASES,
    TERMINAL_TRAINING_STATES,
    RoundPhase,
    TaskKind,
    TaskState,
    TrainingState,
    UpdateState,
)
from fl_server_core.models import (
    GlobalModel,
    ModelVersion,
    Participant,
    Round,
    Task,
    Training,
    User,
)
from fl_server_core.selectors import tasks_visible_to
from fl_server_core.selectors.own_updates import own_updates
from fl_server_core.services.clients import training_missing
from fl_server_core.services.lateness import may_be_late
from fl_server_core.services.round_policy import policy_of
from fl_server_core.services.rounds import OUT, current_round, round_tally, task_fail
from fl_server_core.services.sampling import spread
from fl_server_core.services.trainings import training_locked

RETRY_AFTER = 2.0  # seconds
RETRY_NOT_A_CLIENT = 30.0
RUNNING = (TrainingState.ONGOING, TrainingState.SWAG_ROUND)
MAX_PROGRESS = 65_536  # bytes of JSON
MAX_CODE, MAX_FAILURE, MAX_LOG_TAIL = 64, 900, 3_000  # characters; together they fit in the column
ASKING = (
    Q(kind=TaskKind.TRAIN)  # its round may have closed without it, in asynchronous modes
    | Q(kind=TaskKind.INITIAL_WEIGHTS, round__training__model__awaits_weights=True)
    | Q(kind=TaskKind.SWAG, round__phase=RoundPhase.SWAG)
    | Q(kind=TaskKind.EVALUATE, round__phase=RoundPhase.TESTING)
)
ROUTES = {TaskKind.TRAIN: "", TaskKind.SWAG: "swag/", TaskKind.EVALUATE: "metrics/"}


def task_next(*, user: User) -> dict[str, Any]:
    """A task, or what is waited for, or that all is done. Asking again gives the same task.

    An account that is no client and never took part would wait for ever: its "wait" has a `code`.
    """
    task = (
        tasks_visible_to(user)
        .filter(ASKING, _due(), state=TaskState.OPEN, round__training__state__in=RUNNING)
        .filter(
            round__training__aggregation_method__in=list(STRATEGIES)
        )  # else it waits for its plug-in
        .order_by("created_at", "id")
        .first()
    )
    if task is not None:
        if task.fetched_at is None:
            Task.objects.filter(pk=task.pk, fetched_at=None).update(fetched_at=timezone.now())
        return {"state": "task", "task": _task(task)}
    return _nothing_to_do(user)


def _due() -> Q:
    return Q(not_before=None) | Q(not_before__lte=timezone.now())


def _weights(model: GlobalModel, version: ModelVersion) -> dict[str, Any]:
    return {
        "id": str(model.pk),
        "version": version.number,
        "url": f"/api/models/{model.pk}/?version={version.number}",
        "sha256": version.blob.digest,
        "bytes": version.blob.size,
        "container": model.container,
    }


def _start(task: Task) -> dict[str, Any]:
    """The weights to begin with: in a daisy chain another participant's."""
    model = task.round.training.model
    start = _weights(model, _version(task, model))
    if task.kind != TaskKind.TRAIN or task.continues is None or task.continues.blob is None:
        return start
    return {
        **start,
        "url": f"/api/models/{model.pk}/",
        "sha256": task.continues.digest,
        "bytes": task.continues.size,
    }


def _version(task: Task, model: GlobalModel) -> ModelVersion:
    """What the part began with: an older version than the current one where parts outlive their rounds."""
    older = task.kind == TaskKind.TRAIN and task.round.base_version_id != model.current_version_id
    return task.round.base_version if older else model.weights


def _task(task: Task) -> dict[str, Any]:
    training = task.round.training
    model = training.model
    initial = task.kind == TaskKind.INITIAL_WEIGHTS
    upload = "" if initial else f"/api/models/{model.pk}/{ROUTES[TaskKind(task.kind)]}"
    return {
        "id": str(task.pk),
        "kind": task.kind,
        "training": str(training.pk),
        "round": task.number,
        "model": {"id": str(model.pk)} if initial else _start(task),
        "extras": None if initial else _extras(task, model),
        "upload_url": upload or f"/api/tasks/{task.pk}/result/",
        "config": {
            **client_config(training),
            "round": task.number,
            "rounds": training.target_num_updates,
            **_swag_rank(task, training),
            **({"daisy_chain": True} if training.options.get("daisy_chain_period") else {}),
        },
        **_own_updates(task),
        "created_at": task.created_at.isoformat(),
        "deadline": task.round.deadline.isoformat() if task.round.deadline else None,
    }


def _own_updates(task: Task) -> dict[str, dict[str, list[int]]]:
    """For clients that remember something between rounds: which of it the model has never seen."""
    if task.kind != TaskKind.TRAIN:
        return {}
    training, owner = task.round.training, task.user_id
    return {"own_updates": asdict(own_updates(training=training, owner=owner, before=task.number))}


def _swag_rank(task: Task, training: Training) -> dict[str, int]:
    """How many deviations a site may send with its moments, where any are wanted."""
    rank = trainer_options(training).swag_rank if task.kind == TaskKind.SWAG else 0
    return {"swag_rank": rank} if rank else {}


def _extras(task: Task, model: GlobalModel) -> dict[str, Any] | None:
    """What the strategy has for its clients beside the weights; before its first round nothing."""
    version = _version(task, model)
    if task.kind != TaskKind.TRAIN or version.shared is None:
        return None
    return {
        "url": f"/api/models/{model.pk}/extras/?version={version.number}",
        "sha256": version.shared.digest,
        "bytes": version.shared.size,
    }


def _nothing_to_do(user: User) -> dict[str, Any]:
    live = (
        Training.objects.filter(memberships__user=user, memberships__removed_at=None)
        .exclude(state__in=TERMINAL_TRAINING_STATES)
        .select_related("model")
        .order_by(F("started_at").asc(nulls_last=True), "created_at")
        .first()
    )
    if live is not None:
        return {**_waiting(live, user), "retry_after": _come_back(live, user)}
    last = (
        Participant.objects.filter(user=user)
        .select_related("training__model__current_version__blob")
        .order_by(
            F("removed_at").desc(nulls_first=True),
            F("training__finished_at").desc(nulls_last=True),
        )
        .first()
    )
    if last is None and not user.client:
        said = "this account is not registered as a client: no training can ask it anything"
        return {**_wait(said), "retry_after": RETRY_NOT_A_CLIENT, "code": "NOT_A_CLIENT"}
    if last is None:
        return _wait("you are not in any training yet")
    return _done(last)


def _wait(reason: str) -> dict[str, Any]:
    return {"state": "wait", "retry_after": RETRY_AFTER, "reason": reason}


def _come_back(training: Training, user: User) -> float:
    """Seconds until a client without a task should ask again."""
    seconds = training.options.get("check_in")
    if seconds is None:
        return RETRY_AFTER
    number = training.model.round
    return spread(seconds, seed=training.seed, number=number, name=str(user.pk))


def _done(membership: Participant) -> dict[str, Any]:
    """The end. Who was taken out may no longer fetch the model, so there is none in the answer."""
    training = membership.training
    answer = {
        "state": "done",
        "training": str(training.pk),
        "training_state": training.state,
    }
    if membership.removed_at is not None:
        return {**answer, "reason": f"you were taken out of training {training.pk}"}
    ended = f"training {training.pk} is {training.get_state_display()}"
    return {
        **answer,
        "final_model": _weights(training.model, training.model.weights),
        "reason": training.reason or ended,
    }


def _waiting(training: Training, user: User) -> dict[str, Any]:
    """A wait that also says if the user's own update does not count, or not yet."""
    if training.state == TrainingState.INITIAL:
        return _wait(_not_started(training, user))
    round = current_round(training)
    reason = _reason(training, round)
    if round is None:
        return _wait(reason)
    update = round.local_models.filter(owner=user).order_by("created_at").last()
    if update is None or update.state not in OUT:
        return _wait(reason)
    if update.state == UpdateState.REFUSED:
        said = f"your update of round {round.number} was refused: {update.reason}"
    else:
        said = (
            f"your update of round {round.number} is in quarantine: {update.reason}; "
            "the training's actor or an admin decides"
        )
    own = {"round": round.number, "state": update.state, "reason": update.reason}
    return {**_wait(f"{said}. {reason[0].upper()}{reason[1:]}"), "own_update": own}


def _not_started(training: Training, user: User) -> str:
    """With the newest training that has ended, for a site that has taken part in one already."""
    mine = Training.objects.filter(memberships__user=user, memberships__removed_at=None)
    more = mine.filter(state=TrainingState.INITIAL).count()
    said = f"training {training.pk} has not started yet"
    if more > 1:
        said = f"{more} trainings have not started yet, such as {training.pk}"
    ended = mine.filter(state__in=TERMINAL_TRAINING_STATES).order_by("finished_at").last()
    return f"{said}; training {ended.pk} is {ended.get_state_display()}" if ended else said


def _reason(training: Training, round: Round | None) -> str:
    if training.state == TrainingState.PAUSED:
        return f"training {training.pk} is paused"
    if round is None:
        return f"training {training.pk} has no round yet"
    if training.model.awaits_weights:
        return f"training {training.pk} waits for the initial weights from one of its clients"
    lacking = training_missing(training) if round.phase in OPEN_PHASES else []
    if lacking and not round.tasks.filter(kind=TaskKind.TRAIN).exists():
        return (
            f"the first round waits for {len({m.user.pk for m in lacking})} clients that have not joined with "
            "all that the training requires; POST clients/me/join/ says what is missing"
        )
    if round.phase in OPEN_PHASES:
        tally = round_tally(round, TaskKind.TRAIN)
        return (
            f"round {round.number} waits for others: {tally.done} of {tally.total} updates are in"
        )
    if round.phase == RoundPhase.SWAG:
        tally = round_tally(round, TaskKind.SWAG)
        return f"the SWAG round waits for others: {tally.done} of {tally.total} moments are in"
    if round.phase == RoundPhase.TESTING:
        tally = round_tally(round, TaskKind.EVALUATE)
        return f"the test waits for others: {tally.done} of {tally.total} answers are in"
    return f"round {round.number} is being aggregated"


def task_wait(*, user: User, seconds: float) -> dict[str, Any]:
    """The same, but a "wait" is held back up to `seconds` for something better to say.

    No database connection is held meanwhile. What changes between looking and waiting is not missed.
    Where too many wait already (`places`), the answer comes at once.
    """
    if seconds <= 0:
        return task_look(user=user).answer
    with place(str(user.pk)) as granted:
        return _answer(user, min(seconds, settings.FL_POLL_SECONDS) if granted else 0.0)


@dataclass(frozen=True)
class Look:
    """An answer, and the generation (`wakeups`) with which to wait for a better one, if that is any use."""

    answer: dict[str, Any]
    seen: int
    final: bool


def task_look(*, user: User) -> Look:
    """`task_next` for those who wait by themselves; leaves no database connection."""
    seen = wakeups.generation(str(user.pk))
    with wakeups.gate:
        answer = task_next(user=user)
        if not connection.in_atomic_block:
            connection.close()
    return Look(answer, seen, final=answer["state"] != "wait" or "code" in answer)


def _answer(user: User, seconds: float) -> dict[str, Any]:
    deadline = time.monotonic() + seconds
    while True:
        look = task_look(user=user)
        left = deadline - time.monotonic()
        if look.final or left <= 0:
            return look.answer
        wakeups.wait(str(user.pk), look.seen, left)


def task_progress(
    *,
    task: Task,
    user: User,
    step: int | None = None,
    of: int | None = None,
    metrics: dict[str, float] | None = None,
    timings: dict[str, float] | None = None,
) -> dict[str, Any]:
    """Note how far a client is; tells it to stop when nobody waits for its answer any more.

    `Invalid` if there is too much of it, or anything that the database could not hold.
    """
    _own(task, user)
    progress = {"step": step, "of": of, "metrics": metrics or {}, "timings": timings or {}}
    _check_progress(progress)
    Task.objects.filter(pk=task.pk, state=TaskState.OPEN).update(
        progress=progress, progress_at=timezone.now()
    )
    task = Task.objects.select_related("round__training").get(pk=task.pk)
    wanted = task.state == TaskState.OPEN or may_be_late(task, policy_of(task.round.policy))
    running = task.round.training.state in RUNNING and wanted
    deadline = task.round.deadline
    return {
        "command": None if running else "stop",
        "deadline": deadline.isoformat() if deadline else None,
    }


def _check_progress(progress: dict[str, Any]) -> None:
    try:
        text = json.dumps(progress, allow_nan=False, ensure_ascii=False)
        size = len(text.encode())
    except ValueError as error:  # NaN, infinity, half of a surrogate pair
        raise Invalid(f"progress can't be stored: {error}", code="BAD_PROGRESS") from error
    if "\\u0000" in text:
        raise Invalid("progress can't be stored: it holds a NUL", code="BAD_PROGRESS")
    if size > MAX_PROGRESS:
        raise Invalid(f"progress is larger than {MAX_PROGRESS} bytes", code="BAD_PROGRESS")


@committing("task.fail")
def task_failure(*, task: Task, user: User, code: str, text: str, log_tail: str = "") -> None:
    """End a client's part in a round because it says that it failed; the round goes on without it.

    Said again, or after the part has ended otherwise, it changes nothing.
    """
    _own(task, user)
    training = training_locked(task.round.training_id)
    task = Task.objects.select_related("round").get(pk=task.pk)
    said = f"{text[:MAX_FAILURE]}\n{log_tail[-MAX_LOG_TAIL:]}".strip()
    task_fail(task=task, code=code[:MAX_CODE], text=said)
    round_advance(training_id=training.pk)


def _own(task: Task, user: User) -> None:
    if task.user_id != user.pk:
        raise NotFound(f"no task {task.pk}")
