"""Every participant's moments are in: combine them, and go on where the SWAG round came in between."""

from fl_server_ai.trainer.events.training_round_finished import TrainingRoundFinished
from fl_server_ai.trainer.moments import combine_round
from fl_server_core.lifecycle import RoundPhase, TrainingState, move
from fl_server_core.models import SwagMoments


class SWAGRoundFinished(TrainingRoundFinished):
    """The SWAG round (https://arxiv.org/abs/1902.02476) of an aggregation is complete, or its deadline has passed."""

    def handle(self) -> None:
        """Combine the moments; a round that has its own already, or takes none, stays as it is."""
        round = self.trainer.round
        if round is None or round.phase != RoundPhase.SWAG or self._combined():
            return
        combine_round(self.training, round, self.trainer.options, self.trainer.work)

    def next(self) -> None:
        """The training goes on (state O), with what would have followed the aggregation."""
        round = self.trainer.round
        if round is None or round.phase != RoundPhase.SWAG or not self._combined():
            return
        if self.training.state == TrainingState.SWAG_ROUND:
            move(self.training, TrainingState.ONGOING)
        self.follow(round)

    def _combined(self) -> bool:
        return SwagMoments.objects.filter(round=self.trainer.round, owner=None).exists()
