"""Weights that a client provides: one participant is asked, and what it sends is version 0 for everybody.

Callers hold the training's row lock.
"""

from django.utils import timezone

from fl_server_core.exceptions import DuplicateUpdate, RoundClosed
from fl_server_core.lifecycle import OPEN_PHASES, TaskKind, TaskState, TrainingState, move
from fl_server_core.models import Blob, GlobalModel, ModelVersion, Round, Task, User
from fl_server_core.services.asking import eligible_now
from fl_server_core.services.blobs import blobs_doom_unreferenced
from fl_server_core.services.round_policy import RoundPolicy, policy_of
from fl_server_core.services.rounds import deadline_in, tasks_again, tasks_expire
from fl_server_core.services.sampling import uniform

KIND = TaskKind.INITIAL_WEIGHTS


def initial_ask(round: Round) -> tuple[list[Task], bool]:
    """Ask one participant for the weights: (new parts, whether somebody is asked or may be later).

    Who fails or is late is followed by another, in an order drawn from the training's seed. With the
    failure policy "wait" the first ones are asked again when all have failed.
    """
    policy, training = policy_of(round.policy), round.training
    if round.deadline is not None and round.deadline <= timezone.now():
        tasks_expire(round=round)
    parts = round.tasks.filter(kind=KIND)
    if parts.filter(state=TaskState.OPEN).exists():
        return [], True
    asked = set(parts.values_list("user_id", flat=True))
    members, there = eligible_now(round)
    left = [user for user in there if user.pk not in asked]
    left.sort(key=lambda user: uniform(training.seed, round.number, f"initial:{user.pk}"))
    tasks: list[Task] = []
    if left:
        tasks = [Task.objects.create(round=round, user=left[0], kind=KIND, number=round.number)]
    elif policy.failure_policy == "wait":
        tasks = tasks_again(round=round, kind=KIND)
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


def initial_check(*, task: Task, digest: str) -> bool:
    """Whether weights may be set by this part; False for the same ones again. Else a refusal."""
    if task.state == TaskState.DONE:
        version = ModelVersion.objects.select_related("blob").get(pk=task.round.base_version_id)
        if version.blob.digest == digest:
            return False
        raise DuplicateUpdate("you have already sent other initial weights")
    training = task.round.training
    running = training.state in {TrainingState.ONGOING, TrainingState.PAUSED}
    if task.state != TaskState.OPEN or not running or task.round.phase not in OPEN_PHASES:
        raise RoundClosed(
            f"nobody waits for these initial weights any more; your part is {task.state}",
            code="TASK_CLOSED",
            round=task.round.number,
        )
    return True


def initial_set(*, task: Task, owner: User, blob: Blob) -> ModelVersion:
    """Make the weights version 0 of the model, bound by their digest for everybody, and end the part."""
    blob.save()
    version = ModelVersion.objects.get(pk=task.round.base_version_id)
    empty = version.blob_id
    ModelVersion.objects.filter(pk=version.pk).update(blob=blob)
    GlobalModel.objects.filter(pk=version.model_id).update(awaits_weights=False)
    move(task, TaskState.DONE, finished_at=timezone.now())
    blobs_doom_unreferenced(ids=[empty])
    version.blob = blob
    return version
