"""Which class handles a durable event: those that end a round, and the one that comes while it collects."""

from fl_server_ai.trainer.events import EVENTS, ModelTrainerEvent
from fl_server_ai.trainer.events.updates_arrived import UpdatesArrived

KINDS: dict[str, type[ModelTrainerEvent]] = {**EVENTS, UpdatesArrived.__name__: UpdatesArrived}


def event_kind(type: str) -> type[ModelTrainerEvent]:
    """The class of a row's type; what follows a colon tells several of one round apart."""
    return KINDS[type.partition(":")[0]]
