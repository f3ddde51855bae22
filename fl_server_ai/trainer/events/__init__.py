"""What can happen to a training: one class a file; `EVENTS` finds the class of a durable row."""

from fl_server_ai.trainer.events.base import ModelTrainerEvent
from fl_server_ai.trainer.events.daisy_chain_round_finished import DaisyChainRoundFinished
from fl_server_ai.trainer.events.model_test_finished import ModelTestFinished
from fl_server_ai.trainer.events.swag_round_finished import SWAGRoundFinished
from fl_server_ai.trainer.events.training_round_finished import TrainingRoundFinished

__all__ = [
    "EVENTS",
    "DaisyChainRoundFinished",
    "ModelTestFinished",
    "ModelTrainerEvent",
    "SWAGRoundFinished",
    "TrainingRoundFinished",
]

EVENTS: dict[str, type[ModelTrainerEvent]] = {
    event.__name__: event
    for event in (
        TrainingRoundFinished,
        SWAGRoundFinished,
        DaisyChainRoundFinished,
        ModelTestFinished,
    )
}
