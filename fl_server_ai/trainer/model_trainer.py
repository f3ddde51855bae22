"""What a training does, step by step: the vocabulary that events are written in."""

import logging

from django.db import transaction

from fl_server_ai.services import trainings
from fl_server_ai.services.training_options import trainer_options
from fl_server_ai.trainer.events.base import ModelTrainerEvent
from fl_server_ai.trainer.options import TrainerOptions
from fl_server_core.killpoints import committing
from fl_server_core.lifecycle import TrainingState
from fl_server_core.models import Round, TrainerEvent, Training
from fl_server_core.services.events import event_finish, event_release
from fl_server_core.services.rounds import current_round
from fl_server_core.services.trainings import training_locked

log = logging.getLogger("fl.server")


class ModelTrainer:
    """Moves one training. Every step locks the training's row and may be taken twice.

    `work` is the claimed row that this trainer acts for; its attempt fences what is published.
    """

    def __init__(
        self,
        training: Training,
        options: TrainerOptions | None = None,
        work: TrainerEvent | None = None,
    ) -> None:
        self.training = training
        self.options = options or trainer_options(training)
        self.work = work

    @property
    def round(self) -> Round | None:
        """The round that this is about: the claimed row's, else the newest."""
        if self.work is not None:
            return Round.objects.select_related("result_version").get(pk=self.work.round_id)
        return current_round(self.training)

    def start(self) -> None:
        """Start the training as its actor."""
        trainings.training_start(training=self.training, user=self.training.actor)

    @transaction.atomic
    def start_round(self) -> None:
        """Open the round that the model stands at."""
        trainings.round_start(self._locked())

    @transaction.atomic
    def test_round(self) -> None:
        """Ask for metrics of the newest round's result."""
        training = self._locked()
        round = current_round(training)
        if round is not None:
            round.training = training
            trainings.evaluation_start(training, round)

    @transaction.atomic
    def start_swag_round(self) -> None:
        """Ask for moments of the newest round's result."""
        training = self._locked()
        round = current_round(training)
        if round is not None:
            round.training = training
            trainings.swag_start(training, round)

    @transaction.atomic
    def finish(self) -> None:
        """Complete the training."""
        training = self._locked()
        round = current_round(training)
        if round is not None:
            trainings.training_finish(training, round)

    def handle(self, event: ModelTrainerEvent | type[ModelTrainerEvent]) -> None:
        """Do the event's work, then what follows; the claimed row is done in the same commit.

        Paused meanwhile: what was worked on is published, and what follows waits in the row for the resume.
        """
        current = event(self) if isinstance(event, type) else event
        current.handle()
        with committing("event.finish"):
            paused = self._locked().state == TrainingState.PAUSED
            if self.work is not None and paused:
                event_release(event=self.work, error="", spent=False)
            elif self.work is None or event_finish(event=self.work):
                current.next()
            else:
                log.warning("%s of %s was taken over; nothing done", self.work.type, self.work.pk)

    def _locked(self) -> Training:
        self.training = training_locked(self.training.pk)
        return self.training
