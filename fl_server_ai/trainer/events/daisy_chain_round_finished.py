"""Every update of a chain step is in: the models go on to the next sites, and nothing is averaged."""

from django.utils import timezone

from fl_server_ai.trainer.events.training_round_finished import TrainingRoundFinished
from fl_server_core.killpoints import committing
from fl_server_core.lifecycle import RoundPhase, move
from fl_server_core.models import GlobalModel
from fl_server_core.services.chains import chain_consume
from fl_server_core.services.events import event_held
from fl_server_core.services.trainings import training_locked


class DaisyChainRoundFinished(TrainingRoundFinished):
    """A local round of federated daisy-chaining, https://arxiv.org/abs/2110.03469, that ends without an average.

    Who goes on with whose model is drawn when the next round opens, over those who are there then.
    """

    @committing("chain.step")
    def handle(self) -> None:
        """Count the round and settle the updates that others went on from; done already, nothing happens."""
        round, training = self.trainer.round, training_locked(self.training.pk)
        if round is None or round.phase != RoundPhase.AGGREGATING:
            return
        if training.model.round != round.number:
            return
        if self.trainer.work is not None and not event_held(event=self.trainer.work):
            return
        chain_consume(training, delete=self.trainer.options.delete_local_models_after_aggregation)
        GlobalModel.objects.filter(pk=training.model_id).update(round=round.number + 1)

    def next(self) -> None:
        """The next local round. A chain step is never tested: there is no one model to test."""
        round = self.trainer.round
        if round is None or round.phase != RoundPhase.AGGREGATING:
            return
        if self.training.model.round > round.number:
            move(round, RoundPhase.DONE, finished_at=timezone.now())
            self.trainer.start_round()
