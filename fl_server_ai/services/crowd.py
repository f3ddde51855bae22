"""How many workers there are that could share a round: a hint, like everything that comes from the broker."""

import logging

from celery import current_app
from django.conf import settings
from kombu.exceptions import KombuError

log = logging.getLogger("fl.celery")
QUEUE = "aggregation"
SECONDS = 1.0  # that answers are waited for


def aggregation_workers() -> int:
    """Processes that take work from the aggregation queue, over all machines; at least 1.

    1 without a broker, and in the embedded server.
    """
    if settings.FL_EXECUTOR != "celery":
        return 1
    try:
        queues = current_app.control.inspect(timeout=SECONDS).active_queues() or {}
        names = [
            name for name, taken in queues.items() if any(one["name"] == QUEUE for one in taken)
        ]
        if not names:
            return 1
        stats = current_app.control.inspect(destination=names, timeout=SECONDS).stats() or {}
    except (OSError, KombuError) as error:
        log.warning("the aggregation workers were not counted: %s", error)
        return 1
    return max(1, sum(int(one["pool"]["max-concurrency"]) for one in stats.values()))
