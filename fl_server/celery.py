"""The Celery application: JSON messages that carry row ids and nothing else."""

import importlib
import logging
import os

from celery import Celery
from celery.signals import setup_logging, worker_process_init

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "fl_server.settings.production")  # noqa: TID251
app = Celery("fl_server")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks(["fl_server_ai.trainer"])
app.set_default()  # "current" holds for this thread only, and the web has hundreds
log = logging.getLogger("fl.celery")


@setup_logging.connect
def _keep_logging(**_: object) -> None:
    """Django has set it up; connecting this keeps Celery from doing it again."""


@worker_process_init.connect
def _warm_up(**_: object) -> None:
    """Import torch where it works, after the fork: its threads and CUDA don't survive one."""
    if "aggregation" in app.amqp.queues.consume_from:
        importlib.import_module("fl_server_ai.trainer.working")
        log.info("ready for aggregation")
