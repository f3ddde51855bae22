"""Updates whose files were lost after they had been accepted: asked for again, or done without."""

import logging
from collections.abc import Sequence

from django.utils import timezone

from fl_server_ai.services.rounds import RUNNING, round_advance, tell
from fl_server_core.killpoints import committing
from fl_server_core.lifecycle import RoundPhase, TaskKind, TaskState, UpdateState, move
from fl_server_core.models import LocalModel, Round, Task, TrainerEvent, Training
from fl_server_core.services.blobs import blobs_doom_unreferenced
from fl_server_core.services.round_policy import policy_of
from fl_server_core.services.rounds import deadline_in, tasks_ask_again
from fl_server_core.services.slices import slices_drop
from fl_server_core.services.trainings import participants_active, training_locked

log = logging.getLogger("fl.server")
CODE = "UPDATE_LOST"


@committing("updates.lost")
def updates_lost(*, event: TrainerEvent, lost: Sequence[tuple[LocalModel, str]]) -> None:
    """Take these updates out of the round that is aggregated, and ask what follows.

    An update of this very round goes back to being asked for, with the round's own deadline, or a new one where the
    failure policy is to wait; past the deadline its owner has failed, and the policy says what becomes of the round.
    A late one is refused with the reason, and the round does without it or takes others.
    Who finds the round moved on changes nothing.
    """
    training = training_locked(event.training_id)
    round = Round.objects.get(pk=event.round_id)
    if training.state not in RUNNING or round.phase != RoundPhase.AGGREGATING:
        return
    if round.result_version_id is not None:
        return
    round.training = training
    reasons = {update.pk: said for update, said in lost}
    found = LocalModel.objects.filter(pk__in=reasons, state=UpdateState.ACCEPTED)
    updates = list(found.select_related("owner", "trained_in").order_by("owner_id"))
    if not updates:
        return  # another slice's worker was first
    here = [update for update in updates if update.round_id == round.pk]
    for update in updates:
        log.error("training %s: %s of %s: %s", training.pk, CODE, update, reasons[update.pk])
    slices_drop(event=event)
    failed = [_take_out(round, update, reasons[update.pk]) for update in updates]
    if here:
        _collect_again(training, round, [task for task in failed if task is not None])
        event.delete()  # there is another one when the round is complete again
        round_advance(training_id=training.pk)


def _take_out(round: Round, update: LocalModel, reason: str) -> Task | None:
    """Give the update up; the part that it answered, if that is one of this round."""
    said = f"{CODE}: {reason}"
    ids = [pk for pk in (update.blob_id, update.extras_id, update.mask_id) if pk is not None]
    task = None
    if update.round_id == round.pk and update.trained_in is None:
        parts = round.tasks.filter(user=update.owner_id, kind=TaskKind.TRAIN, state=TaskState.DONE)
        task = parts.select_related("user").first()
    if task is not None:
        told = task.fetched_at or update.created_at  # `own_updates` names what it has begun
        move(task, TaskState.FAILED, failure=said, finished_at=timezone.now(), fetched_at=told)
        update.delete()  # its owner may send the same again
    else:
        answered = update.trained_in or update.round
        move(
            update,
            UpdateState.REFUSED,
            reason=said,
            round=answered,
            trained_in=None,
            blob=None,
            extras=None,
            mask=None,
        )
    blobs_doom_unreferenced(ids=ids)
    round.warnings = [*round.warnings, f"the update of {update.owner_id} was lost: {reason}"]
    round.save(update_fields=["warnings"])
    return task


def _collect_again(training: Training, round: Round, failed: list[Task]) -> None:
    policy, now = policy_of(round.policy), timezone.now()
    left = policy.seconds - (now - round.started_at).total_seconds()
    waits = policy.failure_policy == "wait"
    deadline = deadline_in(policy.seconds if waits and left <= 0 else max(0.0, left))
    move(round, RoundPhase.COLLECTING, deadline=deadline)
    members = {user.pk for user in participants_active(training)}
    again = [task for task in failed if task.user_id in members and (waits or left > 0)]
    if again:
        tasks_ask_again(round, TaskKind.TRAIN, again, lambda task: 0.0)
        tell(again)
