"""Every tester has answered: store the mean of each metric, and go on."""

from django.utils import timezone

from fl_server_ai.trainer.events.base import ModelTrainerEvent
from fl_server_core.killpoints import committing
from fl_server_core.lifecycle import RoundPhase, move
from fl_server_core.services.metrics import metrics_aggregate


class ModelTestFinished(ModelTrainerEvent):
    """The test of a round's result is complete, or its deadline has passed."""

    def handle(self) -> None:
        """Store the sample-weighted mean of every metric, over those who sent it."""
        round = self.trainer.round
        if round is not None and round.phase == RoundPhase.TESTING:
            with committing("metrics.mean"):
                metrics_aggregate(model=self.training.model, step=self.training.model.round)

    def next(self) -> None:
        """Open the next round below the target, else finish."""
        round = self.trainer.round
        if round is None or round.phase != RoundPhase.TESTING:
            return
        if self.training.model.round >= self.training.target_num_updates:
            self.trainer.finish()
            return
        move(round, RoundPhase.DONE, finished_at=timezone.now(), deadline=None)
        self.trainer.start_round()
