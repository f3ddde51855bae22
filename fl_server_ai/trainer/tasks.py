"""What Celery (or the embedded executor) calls: each task takes row ids, and may be called twice."""

from celery import shared_task

from fl_server_ai.dispatch import dispatch_event, dispatch_notifications
from fl_server_ai.notifications.delivery import AT_A_TIME
from fl_server_ai.services.notifications import notifications_deliver
from fl_server_ai.services.reconciler import sweep


def dispatch_trainer_task(event_id: int) -> None:
    """Hint, once the transaction has committed, that this event waits to be processed."""
    dispatch_event(event_id)


@shared_task(name="fl_server_ai.trainer.tasks.process_trainer_task")
def process_trainer_task(event_id: int) -> None:
    """Claim one event and handle it. A second delivery finds nothing to claim."""
    # Here and not above: Celery's parent process and beat import this module, and must not load torch.
    from fl_server_ai.trainer.working import event_work

    event_work(event_id)


@shared_task(name="fl_server_ai.trainer.tasks.process_slice")
def process_slice(slice_id: int) -> None:
    """Claim one slice of an event's work and make it. A second delivery finds nothing to claim."""
    from fl_server_ai.trainer.slicing import slice_work

    slice_work(slice_id)


@shared_task(name="fl_server_ai.trainer.tasks.deliver_notifications")
def deliver_notifications() -> None:
    """Deliver the webhook messages that are due; of hundreds some, and the next call goes on with the rest."""
    if notifications_deliver() >= AT_A_TIME:
        dispatch_notifications()


@shared_task(name="fl_server_ai.trainer.tasks.reconcile")
def reconcile() -> None:
    """One sweep; beat sends it every few seconds."""
    sweep()
