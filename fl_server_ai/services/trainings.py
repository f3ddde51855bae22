"""Creating, starting and finishing trainings, and taking clients out of running ones."""

import uuid
from collections.abc import Sequence
from typing import Any

from django.utils import timezone

from fl_server_ai.aggregation.dtypes import check_aggregated
from fl_server_ai.containers import read_manifest
from fl_server_ai.dispatch import dispatch_notifications
from fl_server_ai.notifications import wakeups
from fl_server_ai.services.rounds import round_advance
from fl_server_ai.services.training_options import (
    check_reset,
    check_wanted,
    effective_policy,
    options_validate,
    trainer_options,
)
from fl_server_core.exceptions import (
    Conflict,
    IllegalMove,
    Invalid,
    NotPermitted,
    Unusable,
)
from fl_server_core.killpoints import committing
from fl_server_core.lifecycle import RoundPhase, TrainingState, move
from fl_server_core.models import GlobalModel, Round, Training, User
from fl_server_core.models.notifications import NotificationType
from fl_server_core.models.trainings import UncertaintyMethod
from fl_server_core.models.weights import ModelType
from fl_server_core.services import rounds, trainings
from fl_server_core.services.asking import round_open
from fl_server_core.services.moments import swag_open
from fl_server_core.services.notifications import notifications_queue
from fl_server_core.storage import local_path

MAX_ROUNDS = 2**31 - 1


def training_create(
    *,
    actor: User,
    model: GlobalModel,
    target_num_updates: int,
    aggregation_method: str,
    uncertainty_method: str = UncertaintyMethod.NONE,
    options: dict[str, Any],
    metric_names: Sequence[str] = (),
    clients: Sequence[uuid.UUID] = (),
) -> Training:
    """Create a training after checking every option; what comes later is refused, never ignored."""
    if model.type == ModelType.MEAN:
        raise Unusable(
            "a MEAN model has no weights to train; train its members", code="NOT_TRAINABLE"
        )
    options_validate(
        aggregation_method=aggregation_method,
        options=options,
        uncertainty_method=uncertainty_method,
    )
    check_reset(model, aggregation_method, options)
    target_num_updates *= max(1, int(options.get("daisy_chain_period") or 0))  # local rounds
    if target_num_updates > MAX_ROUNDS:
        raise Invalid(f"a training has at most {MAX_ROUNDS:,} rounds", code="TOO_MANY_ROUNDS")
    if not model.awaits_weights:
        with local_path(model.weights.blob) as path:
            manifest = read_manifest(path)
            check_aggregated(manifest)
            check_wanted(manifest, aggregation_method, options)
    return trainings.training_create(
        actor=actor,
        model=model,
        target_num_updates=target_num_updates,
        aggregation_method=aggregation_method,
        uncertainty_method=uncertainty_method,
        options=options,
        metric_names=metric_names,
        clients=clients,
    )


def training_notices(training: Training) -> list[str]:
    """What researchers and sites should know before a training starts."""
    notices = []
    if training.options.get("daisy_chain_period"):
        notices.append(
            "Daisy chaining: the model that a site has trained on its own data goes to another site as "
            "it is, before it is averaged. A site may refuse."
        )
    if training.uncertainty_method == UncertaintyMethod.ENSEMBLE:
        notices.append(
            "Ensemble: the models that the sites have trained in the last round are kept, and whoever "
            "may ask the training's model gets the mean and the spread of their answers, also of few of "
            "them. Nobody but the researcher and the site itself can get at such a model or ask it alone."
        )
    return notices


@committing("training.start")
def training_start(*, training: Training, user: User) -> None:
    """Start a training: TRAINING_START, then the first round. A second start is an `IllegalMove`."""
    if training.actor_id != user.pk and not user.is_superuser:
        raise NotPermitted("only the actor of a training may start it")
    training = trainings.training_locked(training.pk)
    participants = trainings.participants_active(training)
    if training.state != TrainingState.INITIAL:
        raise IllegalMove(
            f"training {training.pk} is {training.get_state_display()}; it can't be started",
            state=training.state,
        )
    if not participants:
        raise Conflict(
            "this training has no clients; add some with PUT trainings/<id>/clients/",
            code="NO_PARTICIPANTS",
            state=training.state,
        )
    _check_reachable(training, participants)
    check_reset(training.model, training.aggregation_method, training.options)
    if trainer_options(training).reset_state == "session":
        trainings.state_forget(training)
    move(training, TrainingState.ONGOING, started_at=timezone.now(), last_update=timezone.now())
    notifications_queue(
        training=training, type=NotificationType.TRAINING_START, receivers=participants
    )
    round_start(training)


def _check_reachable(training: Training, participants: Sequence[User]) -> None:
    """Refuse a start that could only end in a failed first round."""
    policy = effective_policy(training)
    absent = set(policy.required) - {str(user.pk) for user in participants}
    most = policy.goal(len(participants))
    if absent:
        said = f"these are required, but do not take part: {', '.join(sorted(absent)[:10])}"
    elif policy.min_updates > most:
        said = (
            f"a round needs {policy.min_updates} updates and with {len(participants)} clients comes to "
            f"{most} at most; add clients, or ask for less"
        )
    elif policy.buffered and (policy.buffer_size or 1) > len(participants):
        said = (
            f"a step takes buffer_size = {policy.buffer_size} updates of different clients, and there are "
            f"{len(participants)} clients; add clients, or ask for less"
        )
    else:
        return
    raise Conflict(said, code="POLICY_UNSATISFIABLE", state=training.state)


def round_start(training: Training) -> Round:
    """Open the next round and tell everybody; the training is locked. Again: the round as it is."""
    policy = effective_policy(training)
    opened, _ = round_open(training=training, policy=policy)
    dispatch_notifications()
    round_advance(training_id=training.pk)
    return opened


def swag_start(training: Training, round: Round) -> None:
    """Ask everybody for moments of the new model (state S); the training is locked."""
    swag_open(round=round, seconds=trainer_options(training).seconds)
    dispatch_notifications()
    wakeups.publish([str(pk) for pk in round.tasks.values_list("user_id", flat=True)])
    round_advance(training_id=training.pk)


def evaluation_start(training: Training, round: Round) -> None:
    """Ask everybody to evaluate the new model; the training is locked."""
    rounds.evaluation_open(round=round, seconds=trainer_options(training).seconds)
    dispatch_notifications()
    wakeups.publish([str(pk) for pk in round.tasks.values_list("user_id", flat=True)])
    round_advance(training_id=training.pk)


def training_finish(training: Training, round: Round) -> None:
    """Close the last round and the training, and tell participants and actor; the training is locked."""
    now = timezone.now()
    if round.phase != RoundPhase.SKIPPED:
        move(round, RoundPhase.DONE, finished_at=now, deadline=None)
    move(training, TrainingState.COMPLETED, finished_at=now, last_update=now)
    receivers = {user.pk: user for user in trainings.participants_active(training)}
    receivers.setdefault(training.actor.pk, training.actor)
    notifications_queue(
        training=training,
        type=NotificationType.TRAINING_FINISHED,
        receivers=list(receivers.values()),
    )
    dispatch_notifications()
    wakeups.publish([str(pk) for pk in receivers])


@committing("clients.remove")
def training_clients_remove(
    *, training: Training, user: User, clients: Sequence[uuid.UUID]
) -> None:
    """Take clients out; the round goes on without them, at once if nobody else is missing."""
    removed = trainings.training_drop_clients(training=training, user=user, clients=clients)
    dispatch_notifications()
    wakeups.publish([str(client.pk) for client in removed])
    round_advance(training_id=training.pk)
