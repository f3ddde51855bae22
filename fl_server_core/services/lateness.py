"""Updates that answer an older round than the one that collects: keeping them, and counting each exactly once.

Such an update is stored in the state RECEIVED with the round that it answers. A round that collects takes it over
(`round` is then the one it counts in, `trained_in` the one it answers), and from there on it is like any other.
Callers hold the training's row lock.
"""

from django.db.models import Count, Q
from django.utils import timezone

from fl_server_core.exceptions import DuplicateUpdate, RoundClosed
from fl_server_core.killpoints import reached
from fl_server_core.lifecycle import (
    OPEN_PHASES,
    TaskKind,
    TaskState,
    TrainingState,
    UpdateState,
    move,
    move_all,
)
from fl_server_core.models import LocalModel, ModelVersion, Round, Task, Training, User
from fl_server_core.selectors.gaps import LATE_COUNTS, ROUND_FULL, ROUND_SKIPPED
from fl_server_core.services.blobs import blobs_doom_unreferenced
from fl_server_core.services.round_policy import RoundPolicy, policy_of

COUNTED = (UpdateState.ACCEPTED, UpdateState.CONSUMED)


def staleness_of(version: ModelVersion, current: ModelVersion) -> int:
    """How many versions have come since `version`."""
    return ModelVersion.objects.filter(
        model_id=current.model_id, number__gt=version.number, number__lte=current.number
    ).count()


def answered_by(owner: User, round: Round) -> Q:
    """The update with which `owner` answered `round`, wherever it counts."""
    return Q(owner=owner) & (Q(trained_in=round) | Q(round=round, trained_in=None))


def late_task(*, training: Training, owner: User, number: int, current: Round) -> Task | None:
    """The part that an update for an older round answers; None if it may not be late, or was never asked.

    Raises `DuplicateUpdate` for a second answer, `RoundClosed` (TOO_STALE) for one that is too old.
    """
    policy = policy_of(current.policy)
    last = current.number + 1 >= training.target_num_updates
    if not policy.takes_late or (last and current.phase not in OPEN_PHASES):
        return None
    task = (
        Task.objects.filter(
            round__training=training, round__number=number, user=owner, kind=TaskKind.TRAIN
        )
        .select_related("round__base_version")
        .first()
    )
    if task is None or not may_be_late(task, policy):
        return None
    if training.local_models.filter(answered_by(owner, task.round)).exists():
        raise DuplicateUpdate(f"you have already sent another update for round {number}")
    staleness = staleness_of(task.round.base_version, training.model.weights)
    if staleness > policy.max_staleness:
        raise RoundClosed(
            f"round {number} is {staleness} versions ago, max_staleness is {policy.max_staleness}",
            code="TOO_STALE",
            round=training.model.round,
        )
    return task


def may_be_late(task: Task, policy: RoundPolicy) -> bool:
    """Whether what is sent for this part is welcome although its round has closed without it."""
    if not policy.takes_late:
        return False
    if task.state == TaskState.EXPIRED or task.failure.startswith(f"{ROUND_FULL}:"):
        return True
    return policy.buffered and task.state == TaskState.OPEN


def late_updates_adopt(round: Round) -> int:
    """Let a round that collects take over what is waiting, the oldest first, one of each participant.

    Returns how many. What has become too old meanwhile is refused, and its owner sees why.
    """
    policy, training = policy_of(round.policy), round.training
    if not policy.takes_late:
        return 0
    counted = set(
        LocalModel.objects.filter(round=round, state__in=COUNTED).values_list("owner_id", flat=True)
    )
    waiting = LocalModel.objects.filter(training=training, state=UpdateState.RECEIVED)
    adopted = 0
    for update in waiting.select_related("round__base_version").order_by("created_at", "id"):
        staleness = staleness_of(update.round.base_version, round.base_version)
        if staleness > policy.max_staleness:
            said = f"TOO_STALE: {staleness} versions old, max_staleness is {policy.max_staleness}"
            _refuse([update], said)
        elif update.owner_id in counted:
            continue
        elif policy.buffer_size is not None and len(counted) >= policy.buffer_size:
            break
        else:
            _count_in(round, update, staleness)
            reached("update.adopt")
            counted.add(update.owner_id)
            adopted += 1
    return adopted


def _count_in(round: Round, update: LocalModel, staleness: int) -> None:
    """The update is the owner's part in this round: there is nothing else to wait for from there."""
    answered = update.round if update.round_id != round.pk else None
    move(update, UpdateState.ACCEPTED, round=round, trained_in=answered, staleness=staleness)
    if answered is None:
        return
    move_all(
        round.tasks.filter(user=update.owner_id, kind=TaskKind.TRAIN, state=TaskState.OPEN),
        TaskState.CANCELLED,
        failure=f"{LATE_COUNTS}: the late update of round {answered.number} counts in this round",
        finished_at=timezone.now(),
    )


def late_updates_settle() -> int:
    """Refuse what still waits in trainings that have ended, and give its files up. Returns how many."""
    ended = [TrainingState.COMPLETED, TrainingState.CANCELLED]
    left = list(LocalModel.objects.filter(state=UpdateState.RECEIVED, training__state__in=ended))
    _refuse(left, "TRAINING_ENDED: no further round")
    return len(left)


def updates_pass_over(round: Round) -> None:
    """A round is skipped: what came is not lost where late updates count, else refused with the reason."""
    came = LocalModel.objects.filter(round=round, state=UpdateState.ACCEPTED)
    if not policy_of(round.policy).takes_late:
        _refuse(list(came), f"{ROUND_SKIPPED}: round {round.number} had too few updates to count")
        return
    for update in came.select_related("trained_in"):
        answered = update.trained_in or round
        move(update, UpdateState.RECEIVED, round=answered, trained_in=None, staleness=0)


def _refuse(updates: list[LocalModel], why: str) -> None:
    blobs = [
        pk
        for update in updates
        for pk in (update.blob_id, update.extras_id, update.mask_id)
        if pk is not None
    ]
    move_all(updates, UpdateState.REFUSED, reason=why, blob=None, extras=None, mask=None)
    if blobs:
        blobs_doom_unreferenced(ids=blobs)


def busy_with(training: Training) -> dict[str, int]:
    """Open training parts by participant, over all rounds: in asynchronous modes they outlive theirs."""
    rows = Task.objects.filter(
        round__training=training, kind=TaskKind.TRAIN, state=TaskState.OPEN
    ).order_by()
    return {str(pk): count for pk, count in rows.values_list("user").annotate(Count("pk"))}
