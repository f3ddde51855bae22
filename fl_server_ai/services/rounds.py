"""The question "does this training go on now?", asked wherever the answer may have changed."""

import logging
import uuid
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from django.db import transaction
from django.utils import timezone

from fl_server_ai.dispatch import dispatch_event, dispatch_notifications
from fl_server_ai.notifications import wakeups
from fl_server_ai.services.chaining import AGGREGATE, starts_of, step_after
from fl_server_ai.services.training_options import checks_updates, trainer_options
from fl_server_core.killpoints import reached
from fl_server_core.lifecycle import (
    OPEN_PHASES,
    EventState,
    RoundPhase,
    TaskKind,
    TaskState,
    TrainingState,
    move,
)
from fl_server_core.models import Round, Task, TrainerEvent, Training
from fl_server_core.selectors import failure_code
from fl_server_core.selectors.parts import QUARANTINED
from fl_server_core.services.asking import Asked, round_ask
from fl_server_core.services.buffering import buffer_ask, parts_expire
from fl_server_core.services.initial_weights import initial_ask
from fl_server_core.services.lateness import busy_with, late_updates_adopt, updates_pass_over
from fl_server_core.services.quarantine import updates_unchecked
from fl_server_core.services.round_policy import (
    RoundPolicy,
    Standing,
    Step,
    are_needed,
    decide,
    policy_of,
)
from fl_server_core.services.rounds import (
    current_round,
    deadline_in,
    round_extend,
    round_standing,
    round_tally,
    tasks_again,
    tasks_cancel,
    tasks_close,
    tasks_expire,
    updates_held,
)
from fl_server_core.services.trainings import participants_active, training_locked

log = logging.getLogger("fl.server")
TRAINING_ROUND_FINISHED = "TrainingRoundFinished"
DAISY_CHAIN_ROUND_FINISHED = "DaisyChainRoundFinished"
SWAG_ROUND_FINISHED = "SWAGRoundFinished"
RUNNING = frozenset({TrainingState.ONGOING, TrainingState.SWAG_ROUND})
MODEL_TEST_FINISHED = "ModelTestFinished"
UPDATES_ARRIVED = "UpdatesArrived"


@transaction.atomic
def round_advance(*, training_id: uuid.UUID) -> TrainerEvent | None:
    """Create the event that follows if the round's rows say that nothing more is to come.

    Computed from rows at every call, so asking too often is harmless: the event is unique per round
    and type. Asked after an update, a failure, a removal, a test result, and when a deadline passes.
    """
    training = training_locked(training_id)
    round = current_round(training)
    if training.state not in RUNNING or round is None:
        return None
    round.training = training
    if round.phase == RoundPhase.SWAG:
        return _close_swag(training, round)
    if round.phase in OPEN_PHASES:
        return _close_collection(training, round)
    if round.phase == RoundPhase.TESTING:
        return _close_test(training, round)
    return None


def _is_over(round: Round, kind: TaskKind) -> bool:
    """Whether everybody asked has answered or the deadline has passed, with answers enough to go on.

    Else it does what the policy says: asks again, or ends the training.
    """
    policy, standing = policy_of(round.policy), round_standing(round, kind)
    if kind == TaskKind.SWAG:  # the number that closes a round is one of updates
        policy = replace(policy, buffer_size=None)
    step, reason = decide(policy, standing)
    if step == Step.WAIT:
        return False
    if standing.overdue and not policy.buffered:
        tasks_expire(round=round)
    elif standing.overdue:
        parts_expire(round, policy)
    if step in {Step.AGAIN, Step.EXTEND}:
        _ask_again(round, kind, policy, standing, step)
    elif step == Step.FAIL:
        training_fail(round.training, round, reason or _too_few(round, kind, policy))
    elif step == Step.SKIP:
        _skip(round, _too_few(round, kind, policy))
    elif not policy.buffered:
        tasks_close(round=round)
    return step == Step.CLOSE


def _ask_again(
    round: Round, kind: TaskKind, policy: RoundPolicy, standing: Standing, step: Step
) -> None:
    if step == Step.EXTEND:
        round_extend(round, policy.seconds)
    elif standing.overdue:
        round.deadline = deadline_in(policy.seconds)
        round.save(update_fields=["deadline"])
    tell(tasks_again(round=round, kind=kind))


def tell(tasks: Iterable[Task]) -> None:
    """Send the messages that are queued and wake those who wait, once this is committed."""
    dispatch_notifications()
    wakeups.publish([str(task.user_id) for task in tasks])


def _skip(round: Round, why: str) -> None:
    if policy_of(round.policy).buffered:
        _end_last_parts(round.training, round)
    else:
        tasks_close(round=round)
    updates_pass_over(round)
    reached("round.skip")
    move(round, RoundPhase.SKIPPED, reason=why, deadline=None, finished_at=timezone.now())
    _event(round.training, round, TRAINING_ROUND_FINISHED)


def _too_few(round: Round, kind: TaskKind, policy: RoundPolicy) -> str:
    tally, needed = round_tally(round, kind), are_needed(policy.min_updates)
    if kind == TaskKind.SWAG:
        return (
            f"NOT_ENOUGH_MOMENTS: the SWAG round of round {round.number} ended with {tally.done} of "
            f"{tally.total} answers, {needed}"
        )
    return (
        f"NOT_ENOUGH_UPDATES: round {round.number} ended with {tally.done} of {tally.total} "
        f"updates, {needed}{_why_too_few(round, kind)}"
    )


def _why_too_few(round: Round, kind: TaskKind) -> str:
    """The codes with which parts have failed, and how often: names are told elsewhere, to those who may know."""
    failed = round.tasks.filter(kind=kind, state=TaskState.FAILED)
    codes = Counter(failure_code(failure) for failure in failed.values_list("failure", flat=True))
    if kind == TaskKind.TRAIN and (held := updates_held(round).count()):
        codes[QUARANTINED] = held
    told = ", ".join(f"{count} x {code}" for code, count in codes.most_common(5))
    return f" (failed: {told})" if told else ""


def _close_collection(training: Training, round: Round) -> TrainerEvent | None:
    policy = policy_of(round.policy)
    if training.model.awaits_weights:
        _ask_for_weights(training, round)
        return None
    if policy.buffered:
        late_updates_adopt(round)
        if tasks := buffer_ask(round):
            tell(tasks)
        if _nobody_there_yet(round, policy):
            return None
    elif not _is_asked(training, round):
        return None
    elif round.tasks.filter(kind=TaskKind.TRAIN).exists():
        late_updates_adopt(round)
    if checks_updates(training) and updates_unchecked(round):
        return _check_updates(training, round, policy)
    if not _is_over(round, TaskKind.TRAIN):
        return None
    if policy.buffered:
        _end_last_parts(training, round)
    move(round, RoundPhase.AGGREGATING, deadline=None)
    step = step_after(
        trainer_options(training), round=round.number, target=training.target_num_updates
    )
    return _event(
        training,
        round,
        TRAINING_ROUND_FINISHED if step == AGGREGATE else DAISY_CHAIN_ROUND_FINISHED,
    )


def _end_last_parts(training: Training, round: Round) -> None:
    """Parts that outlive their rounds end with the last one."""
    if round.number + 1 < training.target_num_updates:
        return
    users = [str(pk) for pk in busy_with(training)]
    tasks_cancel(training_id=training.pk, why="ROUND_FULL: the training needs no more updates")
    wakeups.publish(users)


def _check_updates(training: Training, round: Round, policy: RoundPolicy) -> TrainerEvent | None:
    """The event that decides on what has arrived; where updates are compared, once the round could end.

    Numbered: a round has as many, one after the other, as it takes.
    """
    if trainer_options(training).min_update_cosine is not None:
        standing = replace(round_standing(round, TaskKind.TRAIN), held=0)
        if decide(policy, standing)[0] == Step.WAIT:
            return None
    done = round.events.filter(type__startswith=f"{UPDATES_ARRIVED}:", state=EventState.DONE)
    return _event(training, round, f"{UPDATES_ARRIVED}:{done.count()}")


def _ask_for_weights(training: Training, round: Round) -> None:
    tasks, hope = initial_ask(round)
    tell(tasks)
    if not hope:
        asked = round.tasks.filter(kind=TaskKind.INITIAL_WEIGHTS).count()
        training_fail(
            training,
            round,
            f"NO_INITIAL_WEIGHTS: {asked} participants were asked for the initial weights, none sent any",
        )


def _nobody_there_yet(round: Round, policy: RoundPolicy) -> bool:
    """Whether too few may be asked now, and more may be before the deadline."""
    now = round_standing(round, TaskKind.TRAIN)
    too_few = now.open == 0 and now.done < policy.min_updates
    return too_few and not now.overdue and policy.selective


def _is_asked(training: Training, round: Round) -> bool:
    """Whether there is something to decide: somebody was asked, or it is too late for that."""
    options = trainer_options(training)
    outcome, tasks = round_ask(round=round, starts=starts_of(training, options))
    if tasks:
        tell(tasks)
    if outcome == Asked.EMPTY:
        _skip(round, f"EMPTY_SAMPLE: the draw of round {round.number} has too few sites")
        return False
    if outcome == Asked.WAITING and participants_active(training):
        return _is_too_late(round)
    return True


def _is_too_late(round: Round) -> bool:
    """Whether too few may still be asked at the deadline; with the failure policy wait it is moved instead."""
    policy = policy_of(round.policy)
    if round.deadline is not None and round.deadline > timezone.now():
        return False
    if policy.failure_policy != "wait":
        return True
    round.deadline = deadline_in(policy.seconds)
    round.save(update_fields=["deadline"])
    return False


def _close_test(training: Training, round: Round) -> TrainerEvent | None:
    standing = round_standing(round, TaskKind.EVALUATE)
    if standing.open and not standing.overdue:
        return None
    if standing.overdue:  # a test goes on without those who fail, under every policy
        tasks_expire(round=round)
    return _event(training, round, MODEL_TEST_FINISHED)


def _close_swag(training: Training, round: Round) -> TrainerEvent | None:
    due = TrainerEvent.objects.filter(round=round, type=SWAG_ROUND_FINISHED).first()
    if due is not None:  # it was over: who comes back now changes nothing
        return due
    if not _is_over(round, TaskKind.SWAG):
        return None
    return _event(training, round, SWAG_ROUND_FINISHED)


def _event(training: Training, round: Round, type: str) -> TrainerEvent:
    event, created = TrainerEvent.objects.get_or_create(training=training, round=round, type=type)
    if created:
        log.info("training %s round %s: %s is due", training.pk, round.number, type)
        dispatch_event(event.pk)
    return event


def training_fail(training: Training, round: Round, reason: str) -> None:
    """End a training with a reason that people can read; the training is locked."""
    now = timezone.now()
    log.error("training %s round %s: %s", training.pk, round.number, reason)
    if round.phase not in {RoundPhase.DONE, RoundPhase.SKIPPED, RoundPhase.FAILED}:
        move(round, RoundPhase.FAILED, reason=reason, finished_at=now, deadline=None)
    move(training, TrainingState.ERROR, reason=reason, finished_at=now, last_update=now)
    users = [str(pk) for pk in round.tasks.values_list("user_id", flat=True)]
    tasks_cancel(training_id=training.pk, why=reason)
    wakeups.publish(users)
