"""Weights that a client provides: one participant is asked, and what it sends is version 0 for everybody.

Callers hold the training's row lock.
"""

from django.db.models import Max
from django.utils import timezone

from fl_server_core.exceptions import DuplicateUpdate, RoundClosed
from fl_server_core.lifecycle import OPEN_PHASES, TaskKind, TaskState, TrainingState, move
from fl_server_core.models import Blob, GlobalModel, ModelVersion, Round, Task, User
from fl_server_core.services.asking import eligible_now
from fl_server_core.services.blobs import blobs_doom_unreferenced
from fl_server_core.services.notifications import notifications_queue
from fl_server_core.services.round_policy import RoundPolicy, policy_of
from fl_server_core.services.rounds import (
    MESSAGES,
    deadline_in,
    pause_after,
    round_end,
    tasks_ask_again,
    tasks_expire,
)
from fl_server_core.services.sampling import uniform

KIND = TaskKind.INITIAL_WEIGHTS


def initial_ask(round: Round) -> tuple[list[Task], bool]:
    """Ask one participant for the weights: (new parts, whether somebody is asked or may be later).

    Who fails or is late is followed by another, in an order drawn from the training's seed; who has an
    endpoint for messages comes last: receivers older than that message may not know it. With the failure policy "wait" they are
    asked again, one at a time, when all have failed.
    """
    policy = policy_of(round.policy)
    end = round_end(round, KIND)
    if end is not None and end <= timezone.now():
        tasks_expire(round=round)
    parts = round.tasks.filter(kind=KIND)
    if parts.filter(state=TaskState.OPEN).exists():
        return [], True
    asked = set(parts.values_list("user_id", flat=True))
    members, there = eligible_now(round)
    left = [user for user in there if user.pk not in asked]
    left.sort(key=lambda user: (bool(user.message_endpoint), _chance(round, user)))
    tasks: list[Task] = []
    if left:
        tasks = [Task.objects.create(round=round, user=left[0], kind=KIND, number=round.number)]
        notifications_queue(
            training=round.training,
            type=MESSAGES[KIND],
            receivers=left[:1],
            round=round.number,
            tasks=tasks,
        )
    else:
        tasks = _ask_one_again(round, there, anew=policy.failure_policy == "wait")
    if tasks:
        round.deadline = deadline_in(policy.seconds)
        round.save(update_fields=["deadline"])
    return tasks, bool(tasks) or (len(there) < len(members) and _may_come(round, policy))


def _may_come(round: Round, policy: RoundPolicy) -> bool:
    """Whether others are waited for that may be asked later; with the failure policy "wait" always."""
    if round.deadline is None or round.deadline > timezone.now():
        return True
    if policy.failure_policy != "wait":
        return False
    round.deadline = deadline_in(policy.seconds)
    round.save(update_fields=["deadline"])
    return True


def initial_retry(round: Round) -> None:
    """Begin anew with those who were asked before: the first of them now, the others after it."""
    _, there = eligible_now(round)
    asked = set(round.tasks.filter(kind=KIND).values_list("user_id", flat=True))
    if all(user.pk in asked for user in there):
        _ask_one_again(round, there, anew=True)


def _ask_one_again(round: Round, users: list[User], *, anew: bool) -> list[Task]:
    """The next one whose turn it is: whoever was asked less often than others, or, `anew`, any one."""
    most = round.tasks.filter(kind=KIND).aggregate(most=Max("attempt"))["most"] or 0
    closed = list(round.tasks.filter(kind=KIND, user__in=users).select_related("user"))
    closed.sort(key=lambda part: (part.attempt, _chance(round, part.user)))
    if not closed or not (anew or closed[0].attempt < most):
        return []
    first = closed[:1]
    tasks_ask_again(round, KIND, first, pause_after if anew else lambda part: 0.0)
    return first


def _chance(round: Round, user: User) -> float:
    return uniform(round.training.seed, round.number, f"initial:{user.pk}")


def initial_check(*, task: Task, digest: str) -> bool:
    """Whether weights may be set by this part; False for the same ones again. Else a refusal."""
    if task.state == TaskState.DONE:
        version = ModelVersion.objects.select_related("blob").get(pk=task.round.base_version_id)
        if version.blob.digest == digest:
            return False
        raise DuplicateUpdate("you have already sent other initial weights")
    training = task.round.training
    running = training.state in {TrainingState.ONGOING, TrainingState.PAUSED}
    wanted = running and task.round.phase in OPEN_PHASES and training.model.awaits_weights
    if task.state != TaskState.OPEN or not wanted:
        raise RoundClosed(
            f"nobody waits for these initial weights any more; your part is {task.state}",
            code="TASK_CLOSED",
            round=task.round.number,
        )
    return True


def initial_set(*, task: Task, owner: User, blob: Blob) -> ModelVersion:
    """Make the weights version 0 of the model, bound by their digest for everybody, and end the part.

    The time of the round begins now.
    """
    blob.save()
    version = ModelVersion.objects.get(pk=task.round.base_version_id)
    empty = version.blob_id
    ModelVersion.objects.filter(pk=version.pk).update(blob=blob)
    GlobalModel.objects.filter(pk=version.model_id).update(awaits_weights=False)
    move(task, TaskState.DONE, finished_at=timezone.now())
    seconds = policy_of(task.round.policy).seconds
    paused = task.round.training.state == TrainingState.PAUSED
    time = {"remaining": seconds} if paused else {"deadline": deadline_in(seconds)}
    Round.objects.filter(pk=task.round_id).update(**time)
    blobs_doom_unreferenced(ids=[empty])
    version.blob = blob
    return version
