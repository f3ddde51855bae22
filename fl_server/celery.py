"""The Celery application: JSON messages that carry row ids and nothing else."""

import importlib
import logging
import os

from celery import Celery
from celery.signals import celeryd_init, setup_logging, worker_process_init

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "fl_server.settings.production")  # noqa: TID251
app = Celery("fl_server")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks(["fl_server_ai.trainer", "fl_server_ai.inference"])
app.set_default()  # "current" holds for this thread only, and the web has hundreds
log = logging.getLogger("fl.celery")
WARM = {
    "aggregation": "fl_server_ai.trainer.working",
    "inference": "fl_server_ai.inference.working",
}


@setup_logging.connect
def _keep_logging(**_: object) -> None:
    """Django has set it up; connecting this keeps Celery from doing it again."""


@celeryd_init.connect
def _refuse(**_: object) -> None:
    """Celery runs Django's checks and forgets what they say."""
    import django

    django.setup()
    from fl_server_ai.checks import plugin_faults

    if faults := plugin_faults():
        raise SystemExit("broken plug-ins; the worker does not start\n" + "\n".join(faults))


@worker_process_init.connect
def _warm_up(**_: object) -> None:
    """Import torch where it works, after the fork: its threads and CUDA don't survive one."""
    for queue, module in WARM.items():
        if queue in app.amqp.queues.consume_from:
            importlib.import_module(module)
            log.info("ready for %s", queue)
