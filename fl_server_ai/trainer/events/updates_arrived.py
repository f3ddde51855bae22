"""Updates are in that have to be looked at before they count."""

from typing import ClassVar

from fl_server_ai.services.rounds import round_advance
from fl_server_ai.trainer.events.base import ModelTrainerEvent
from fl_server_ai.trainer.judging import updates_judge
from fl_server_core.lifecycle import OPEN_PHASES


class UpdatesArrived(ModelTrainerEvent):
    """At least one update waits for a verdict. All that are there get theirs."""

    while_collecting: ClassVar[bool] = True

    def handle(self) -> None:
        """Decide. What has a verdict keeps it; a round that has gone on stays as it is."""
        round = self.trainer.round
        if round is not None and round.phase in OPEN_PHASES:
            updates_judge(self.training, round, self.trainer.options, self.trainer.work)

    def next(self) -> None:
        """Perhaps the round is complete now, or asks for more; perhaps more has arrived."""
        round_advance(training_id=self.training.pk)
