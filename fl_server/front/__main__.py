"""The web of a deployment: `python -m fl_server.front` keeps worker processes at one address."""

import argparse
import logging
import re
import sys

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors import Multiprocess

from fl_server.front.serving import configured, listener

STOP_SECONDS = 30
BIND_SECONDS = 10.0
MOST_WORKERS = 512
NEEDS = """\
Settings come from the environment; these it does not do without:
  DJANGO_SETTINGS_MODULE  fl_server.settings.production
  FL_SECRET_KEY           signs sessions and keys token digests; the same for all processes
  FL_DATABASE_URL         postgres://user:password@host/name
and FL_REDIS_URL and FL_ALLOWED_HOSTS where their defaults don't fit. NAME_FILE instead of NAME is a file that holds
the value."""
HANGING_SECONDS = 60  # a worker that is silent for so long is replaced


class Supervisor(Multiprocess):
    """Uvicorn's, which would wait a minute for the answer of a worker that dies when it is asked."""

    def keep_subprocess_alive(self) -> None:
        for worker in self.processes:
            worker.child_conn.close()  # the worker's end: with its own closed, it is heard to die
        super().keep_subprocess_alive()


def address(given: str) -> tuple[str, int]:
    """Host and port of HOST:PORT; an IPv6 host is in brackets."""
    match = re.fullmatch(r"(\[[^]]+\]|[^:]+):(\d{1,5})", given)
    if not match or int(match[2]) > 65_535:
        raise argparse.ArgumentTypeError(f"{given!r} is not HOST:PORT, such as 127.0.0.1:8000")
    return match[1].strip("[]"), int(match[2])


def processes(given: str) -> int:
    """A number of workers."""
    if not given.isdecimal() or not 1 <= int(given) <= MOST_WORKERS:
        raise argparse.ArgumentTypeError(f"{given!r} is not a number from 1 to {MOST_WORKERS}")
    return int(given)


def arguments() -> argparse.ArgumentParser:
    """What the command takes; needs no settings."""
    parser = argparse.ArgumentParser(
        prog="python -m fl_server.front",
        description=__doc__,
        epilog=NEEDS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--bind",
        type=address,
        default="127.0.0.1:8000",
        metavar="HOST:PORT",
        help="where to listen (127.0.0.1:8000)",
    )
    parser.add_argument(
        "--workers", type=processes, default=2, metavar="N", help="processes (%(default)s)"
    )
    return parser


def main() -> None:
    """Serve until SIGTERM. A worker that dies is replaced; workers end when this process does.

    Exit status 3 if a worker can't load the application: another one couldn't either.
    """
    options = arguments().parse_args()
    host, port = options.bind
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    try:
        settings.FL_WEB_THREADS  # noqa: B018 - whatever is wrong with the settings is said here, once
    except (ImproperlyConfigured, ImportError) as error:
        said = str(error)
        if not settings.configured and "DJANGO_SETTINGS_MODULE" in said:
            said = "set DJANGO_SETTINGS_MODULE=fl_server.settings.production; --help has the others"
        sys.exit(f"can't serve: {said}")
    try:
        bound = listener(host, port, BIND_SECONDS)
    except (OSError, ValueError) as error:
        sys.exit(f"can't serve at {host}:{port}: {error}")
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
