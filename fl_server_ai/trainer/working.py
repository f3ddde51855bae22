"""One worker, one event: claim it, keep its lease, handle it, and say what went wrong if it did."""

import errno
import logging
from functools import partial

from django.db import OperationalError

from fl_server_ai.services.leases import lease_kept
from fl_server_ai.services.reconciler import event_give_up
from fl_server_ai.trainer.events import event_kind
from fl_server_ai.trainer.model_trainer import ModelTrainer
from fl_server_core.exceptions import AggregationException
from fl_server_core.lifecycle import OPEN_PHASES, TrainingState
from fl_server_core.services.blobs import blobs_delete_doomed
from fl_server_core.services.events import event_claim, event_release, event_renew

log = logging.getLogger("fl.celery")
# What a full disk, a lost file server or too much else going on raise: waiting helps.
PASSING = {
    errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ESTALE,
    errno.ETIMEDOUT, errno.ENOTCONN, errno.EROFS,
}  # fmt: skip


def event_work(event_id: int) -> None:
    """Handle the event if it is there to be claimed; otherwise nothing happens."""
    work = event_claim(event_id=event_id)
    if work is None:
        return
    where = f"training {work.training_id} round {work.round.number}"
    with lease_kept(partial(event_renew, event=work)):
        try:
            if work.training.state == TrainingState.PAUSED:
                log.info("%s: paused, %s waits", where, work.type)
                event_release(event=work, error="", spent=False)
                return
            kind = event_kind(work.type)
            if work.round.phase in OPEN_PHASES and not kind.while_collecting:
                log.info("%s: still collecting, %s waits", where, work.type)
                event_release(event=work, error="the round is not complete", spent=False)
                return
            trainer = ModelTrainer(work.training, work=work)
            trainer.handle(kind(trainer))
        except AggregationException as error:
            event_give_up(event=work, reason=f"AGGREGATION_FAILED: {error}")
        except (OSError, OperationalError) as error:
            if not _passing(error):
                log.exception("%s: %s failed, attempt %s", where, work.type, work.attempt)
                event_release(event=work, error=f"{type(error).__name__}: {error}")
                return
            log.warning("%s: %s waits: %s", where, work.type, error)
            event_release(event=work, error=f"{type(error).__name__}: {error}", spent=False)
        except Exception as error:
            log.exception("%s: %s failed, attempt %s", where, work.type, work.attempt)
            event_release(event=work, error=f"{type(error).__name__}: {error}")
        else:
            blobs_delete_doomed()  # nobody waits for this any more: the next round is open


def _passing(error: Exception) -> bool:
    """Whether the same may go well later, without anybody doing anything to the work."""
    if isinstance(error, OperationalError | ConnectionError | TimeoutError):
        return True
    return isinstance(error, OSError) and error.errno in PASSING
