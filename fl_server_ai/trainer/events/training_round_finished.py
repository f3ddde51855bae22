"""Every update of a round is in: aggregate them, publish a version, and go on."""

import logging

from django.utils import timezone

from fl_server_ai.services.training_options import TrainerOptions
from fl_server_ai.trainer.events.base import ModelTrainerEvent
from fl_server_ai.trainer.publishing import aggregate_round
from fl_server_core.lifecycle import RoundPhase, move
from fl_server_core.models import GlobalModel, Round, Training
from fl_server_core.models.trainings import UncertaintyMethod

log = logging.getLogger("fl.server")
TEST, ROUND, FINISH = "test_round", "start_round", "finish"


def follow_up(options: TrainerOptions, *, round: int, target: int) -> str:
    """What follows an aggregation; `round` is the number after the increment.

    =================  ===========================  ===============  ==========
    skip_model_tests   model_test_after_each_round  below target     at target
    =================  ===========================  ===============  ==========
    yes                either                       next round       finish
    no                 yes                          test             test
    no                 no                           next round       test
    =================  ===========================  ===============  ==========

    With `test_every` k, "yes" of the second column holds for every k-th round only.
    """
    at_target = round >= target
    every = options.test_every or (target if options.buffered else 1)
    each = options.model_test_after_each_round and round % every == 0
    if not options.skip_model_tests and (each or at_target):
        return TEST
    return FINISH if at_target else ROUND


def swag_due(training: Training, options: TrainerOptions) -> bool:
    """Whether moments are asked for after the aggregation that has just been published."""
    if training.uncertainty_method != UncertaintyMethod.SWAG:
        return False
    every, number = options.swag_rounds, training.model.round
    return number >= training.target_num_updates or (every > 0 and number % every == 0)


class TrainingRoundFinished(ModelTrainerEvent):
    """The round's sample is complete, or its deadline passed with enough updates."""

    def handle(self) -> None:
        """Aggregate. A round that is still collecting, or published already, stays as it is."""
        round = self.trainer.round
        if round is None or round.phase != RoundPhase.AGGREGATING:
            phase = "not open" if round is None else round.phase
            log.info("training %s: its round is %s, nothing to aggregate", self.training.pk, phase)
            return
        if round.result_version_id is None:
            aggregate_round(self.training, round, self.trainer.options, self.trainer.work)

    def next(self) -> None:
        """A SWAG round where one is due; else test, open the next round or finish."""
        round = self.trainer.round
        if round is not None and round.phase == RoundPhase.SKIPPED:
            self._pass_over(round)
            return
        if round is None or round.phase != RoundPhase.AGGREGATING or not round.result_version_id:
            return
        if swag_due(self.training, self.trainer.options):
            self.trainer.start_swag_round()
        else:
            self.follow(round)

    def _pass_over(self, round: Round) -> None:
        """The number of the round moves on, the model does not; only the last one may be tested."""
        training = self.training
        if training.model.round != round.number:
            return
        GlobalModel.objects.filter(pk=training.model_id).update(round=round.number + 1)
        training.model.round = round.number + 1
        if training.model.round < training.target_num_updates:
            self.trainer.start_round()
        else:
            self.follow(round)

    def follow(self, round: Round) -> None:
        """What the table of `follow_up` says."""
        step = follow_up(
            self.trainer.options,
            round=self.training.model.round,
            target=self.training.target_num_updates,
        )
        if step == ROUND:
            move(round, RoundPhase.DONE, finished_at=timezone.now())
        getattr(self.trainer, step)()
