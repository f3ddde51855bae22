"""What every event has: the trainer, its training and round, `handle()` and `next()`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from fl_server_ai.trainer.model_trainer import ModelTrainer
    from fl_server_core.models import Training


class ModelTrainerEvent(ABC):
    """Something that happened. `handle()` works, `next()` says what follows; both may run twice."""

    while_collecting: ClassVar[bool] = (
        False  # whether there is something to do before the round is complete
    )

    def __init__(self, trainer: ModelTrainer) -> None:
        self.trainer = trainer

    @property
    def training(self) -> Training:
        return self.trainer.training

    @abstractmethod
    def handle(self) -> None:
        """Do the work and publish it, unless it is published already or the round isn't there yet."""

    @abstractmethod
    def next(self) -> None:
        """Take the step that follows, with the training's row locked by the caller."""
