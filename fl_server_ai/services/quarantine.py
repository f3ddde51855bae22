"""A person's decision on an update that was quarantined: by the training's actor, or an admin."""

from django.db import transaction

from fl_server_ai.services.rounds import round_advance, tell
from fl_server_core.killpoints import committing
from fl_server_core.lifecycle import TaskKind
from fl_server_core.models import LocalModel, User
from fl_server_core.services import quarantine
from fl_server_core.services.trainings import may_steer, training_locked


@committing("update.release")
def update_release(*, update: LocalModel, user: User) -> LocalModel:
    """Let it count, if its round has not gone on without it (`RoundClosed`). Again: nothing happens."""
    update = _locked(update, user)
    quarantine.release(update, user=user)
    round_advance(training_id=update.training_id)
    return update


@committing("update.refuse")
def update_refuse(*, update: LocalModel, user: User) -> LocalModel:
    """Give it up for good, and its files; its owner has failed in the round. Again: nothing happens."""
    update = _locked(update, user)
    quarantine.refuse(update, user=user)
    tell(update.round.tasks.filter(user=update.owner_id, kind=TaskKind.TRAIN))
    round_advance(training_id=update.training_id)
    return update


def quarantine_sweep() -> None:
    """Whatever nobody decided on before its round ended is refused: it can't count any more."""
    for training in quarantine.quarantine_overdue():
        with transaction.atomic():
            quarantine.quarantine_settle(training_locked(training.pk))


def _locked(update: LocalModel, user: User) -> LocalModel:
    training = training_locked(update.training_id)
    may_steer(training, user)
    found = LocalModel.objects.select_related("round").get(pk=update.pk)
    found.training = found.round.training = training
    return found
