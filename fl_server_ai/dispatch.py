"""Hints to whoever works: sent on commit, best effort. The rows are the truth, a lost hint costs seconds.

`robust`: what goes wrong after the commit must not look as if there had been none.
"""

import logging
from collections.abc import Callable, Sequence

from celery import current_app, group
from django.conf import settings
from django.db import transaction
from kombu.exceptions import KombuError

from fl_server_core.killpoints import around

log = logging.getLogger("fl.server")
PROCESS = "fl_server_ai.trainer.tasks.process_trainer_task"
SLICE = "fl_server_ai.trainer.tasks.process_slice"
DELIVER = "fl_server_ai.trainer.tasks.deliver_notifications"
INFERENCE = "fl_server_ai.inference.tasks.run_inference"
Sender = Callable[[str, list[int]], None]


def _send_celery(task: str, args: list[int]) -> None:
    """Publish one message and never raise: a broker that is away is the reconciler's business."""
    try:
        current_app.signature(task, args=args).apply_async(retry=False, ignore_result=True)
    except (OSError, KombuError) as error:
        log.warning("hint %s%s not sent (%s); the reconciler will find the row", task, args, error)


def _send_group(task: str, ids: Sequence[int]) -> None:
    """One message for each id, as a group; never raises either."""
    try:
        messages = group(current_app.signature(task, args=[one]) for one in ids)
        messages.apply_async(retry=False, ignore_result=True)
    except (OSError, KombuError) as error:
        log.warning("hints %s%s not sent (%s); the reconciler will find them", task, ids, error)


def _send_nowhere(task: str, args: list[int]) -> None:
    log.debug("no executor: %s%s waits for the reconciler", task, args)


_senders: dict[str, Sender] = {"celery": _send_celery, "none": _send_nowhere}


def register_sender(executor: str, sender: Sender) -> None:
    """Let an executor in this process receive the hints when `FL_EXECUTOR` names it."""
    _senders[executor] = sender


def _send(step: str, task: str, ids: list[int]) -> None:
    with around(step):
        _senders[settings.FL_EXECUTOR](task, ids)


def dispatch_event(event_id: int) -> None:
    """Hint, once the transaction has committed, that this trainer event waits."""
    transaction.on_commit(lambda: _send("hint.event", PROCESS, [event_id]), robust=True)


def dispatch_slices(ids: Sequence[int]) -> None:
    """Hint, once the transaction has committed, that these slices wait: whoever is free takes one."""

    def send() -> None:
        with around("hint.slices"):
            if settings.FL_EXECUTOR == "celery":
                _send_group(SLICE, ids)
            else:
                for one in ids:
                    _senders[settings.FL_EXECUTOR](SLICE, [one])

    transaction.on_commit(send, robust=True)


def dispatch_notifications() -> None:
    """Hint, once the transaction has committed, that messages wait to be delivered."""
    transaction.on_commit(lambda: _send("hint.messages", DELIVER, []), robust=True)


def dispatch_inference(job_id: int) -> None:
    """Hint, once the transaction has committed, that this question to a model waits."""
    transaction.on_commit(lambda: _send("hint.question", INFERENCE, [job_id]), robust=True)
