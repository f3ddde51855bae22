"""What Celery (or the embedded executor) calls: each task takes row ids, and may be called twice."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from celery import shared_task
from django.conf import settings
from django.db import connection

from fl_server_ai.dispatch import dispatch_event
from fl_server_ai.services.notifications import notifications_deliver
from fl_server_ai.services.reconciler import event_give_up, sweep
from fl_server_ai.trainer.events import EVENTS
from fl_server_ai.trainer.model_trainer import ModelTrainer
from fl_server_core.exceptions import AggregationException
from fl_server_core.lifecycle import OPEN_PHASES
from fl_server_core.models import TrainerEvent
from fl_server_core.services.events import event_claim, event_release, event_renew

log = logging.getLogger("fl.celery")


def dispatch_trainer_task(event_id: int) -> None:
    """Hint, once the transaction has committed, that this event waits to be processed."""
    dispatch_event(event_id)


@shared_task(name="fl_server_ai.trainer.tasks.process_trainer_task")
def process_trainer_task(event_id: int) -> None:
    """Claim one event and handle it. A second delivery finds nothing to claim."""
    work = event_claim(event_id=event_id)
    if work is None:
        return
    where = f"training {work.training_id} round {work.round.number}"
    with _lease_kept(work):
        try:
            if work.round.phase in OPEN_PHASES:
                log.info("%s: still collecting, %s waits", where, work.type)
                event_release(event=work, error="the round is not complete", spent=False)
                return
            trainer = ModelTrainer(work.training, work=work)
            trainer.handle(EVENTS[work.type](trainer))
        except AggregationException as error:
            event_give_up(event=work, reason=f"AGGREGATION_FAILED: {error}")
        except Exception as error:
            log.exception("%s: %s failed, attempt %s", where, work.type, work.attempt)
            event_release(event=work, error=f"{type(error).__name__}: {error}")


@contextmanager
def _lease_kept(work: TrainerEvent) -> Iterator[None]:
    """Renew the lease while the work goes on; a worker that dies stops renewing."""
    stop = threading.Event()

    def renew() -> None:
        while not stop.wait(settings.FL_LEASE_SECONDS / 3):
            try:
                if not event_renew(event=work):
                    return
            finally:
                connection.close()

    thread = threading.Thread(target=renew, daemon=True, name="lease")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@shared_task(name="fl_server_ai.trainer.tasks.deliver_notifications")
def deliver_notifications() -> None:
    """Deliver the webhook messages that are due."""
    notifications_deliver()


@shared_task(name="fl_server_ai.trainer.tasks.reconcile")
def reconcile() -> None:
    """One sweep; beat sends it every few seconds."""
    sweep()
