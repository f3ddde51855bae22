"""The web of a deployment: `python -m fl_server.front` keeps worker processes at one address."""

import argparse
import logging
import sys

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors import Multiprocess

from fl_server.front.serving import configured, listener

STOP_SECONDS = 30
BIND_SECONDS = 10.0
HANGING_SECONDS = 60  # a worker that is silent for so long is replaced


class Supervisor(Multiprocess):
    """Uvicorn's, which would wait a minute for the answer of a worker that dies when it is asked."""

    def keep_subprocess_alive(self) -> None:
        for worker in self.processes:
            worker.child_conn.close()  # the worker's end: with its own closed, it is heard to die
        super().keep_subprocess_alive()


def main() -> None:
    """Serve until SIGTERM. A worker that dies is replaced; workers end when this process does.

    Exit status 3 if a worker can't load the application: another one couldn't either.
    """
    parser = argparse.ArgumentParser(prog="python -m fl_server.front", description=main.__doc__)
    parser.add_argument("--bind", default="127.0.0.1:8000", metavar="HOST:PORT")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    options = parser.parse_args()
    host, _, port = options.bind.rpartition(":")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    try:
        settings.FL_WEB_THREADS  # noqa: B018 - whatever is wrong with the settings is said here, once
        bound = listener(host.strip("[]"), int(port), BIND_SECONDS)
    except (ImproperlyConfigured, OSError, ValueError) as error:
        sys.exit(f"can't serve at {options.bind}: {error}")
    config = configured(
        "fl_server.asgi:application",
        stop_seconds=STOP_SECONDS,
        workers=options.workers,
        timeout_worker_healthcheck=HANGING_SECONDS,
    )
    supervisor = Supervisor(config, sockets=[bound])
    supervisor.run()
    if any(worker.exitcode == STARTUP_FAILURE for worker in supervisor.processes):
        sys.exit(STARTUP_FAILURE)


if __name__ == "__main__":
    main()
