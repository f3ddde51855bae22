"""One worker, one event: claim it, keep its lease, handle it, and say what went wrong if it did."""

import logging
from functools import partial

from fl_server_ai.services.leases import lease_kept
from fl_server_ai.services.lost import updates_lost
from fl_server_ai.services.reconciler import event_give_up
from fl_server_ai.trainer.events.base import ModelTrainerEvent
from fl_server_ai.trainer.intact import UpdatesLost
from fl_server_ai.trainer.kinds import event_kind
from fl_server_ai.trainer.model_trainer import ModelTrainer
from fl_server_ai.trainer.slicing import OthersAtWork, event_tell
from fl_server_ai.trainer.trying import tried
from fl_server_core.lifecycle import OPEN_PHASES, TrainingState
from fl_server_core.models import TrainerEvent
from fl_server_core.services.blobs import blobs_delete_doomed
from fl_server_core.services.events import event_claim, event_release, event_renew

log = logging.getLogger("fl.celery")


def event_work(event_id: int) -> None:
    """Handle the event if it is there to be claimed; otherwise nothing happens."""
    work = event_claim(event_id=event_id)
    if work is None:
        return
    where = f"training {work.training_id} round {work.round.number}"
    with (
        lease_kept(partial(event_renew, event=work)),
        tried(
            f"{where}: {work.type}, attempt {work.attempt},",
            release=partial(event_release, event=work),
            give_up=lambda reason: event_give_up(event=work, reason=reason),
        ),
    ):
        if work.training.state == TrainingState.PAUSED:
            log.info("%s: paused, %s waits", where, work.type)
            event_release(event=work, error="", spent=False)
            return
        kind = event_kind(work.type)
        if work.round.phase in OPEN_PHASES and not kind.while_collecting:
            log.info("%s: still collecting, %s waits", where, work.type)
            event_release(event=work, error="the round is not complete", spent=False)
            return
        _handle(work, kind)


def _handle(work: TrainerEvent, kind: type[ModelTrainerEvent]) -> None:
    try:
        trainer = ModelTrainer(work.training, work=work)
        trainer.handle(kind(trainer))
    except OthersAtWork:
        event_release(event=work, error="", spent=False, pause=False)
        event_tell(work.pk)  # the last slice may have been made before that
    except UpdatesLost as error:
        updates_lost(event=work, lost=error.lost)
        event_release(event=work, error=str(error), spent=False, pause=False)
    else:
        blobs_delete_doomed()  # nobody waits for this any more: the next round is open
