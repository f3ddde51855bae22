"""How uvicorn is run, in both ways of running."""

import contextlib
import ctypes
import errno
import logging
import resource
import socket
import sys
import time
from typing import Any

from django.urls import get_resolver
from uvicorn import Config
from uvicorn.config import STARTUP_FAILURE

from fl_server.front.protocol import Protocol

BACKLOG = 1024
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of malloc.h
ARENAS = 2
LARGE = 2**17  # bytes: what malloc begins with
KEEP_SECONDS = 75  # longer than nginx keeps its connections to us

logger = logging.getLogger(__name__)


class Loading(Config):
    """Whatever the application raises when it is imported, its supervisor is told not to try again."""

    def load_app(self) -> Any:
        try:
            return super().load_app()
        except Exception:  # plug-ins, settings and drivers of others raise what they like
            logger.exception("the application can't be loaded; the web stops")
            sys.exit(STARTUP_FAILURE)


def configured(app: Any, *, stop_seconds: int, **others: Any) -> Config:
    """Only what a process must not decide by itself is left to `others`."""
    return Loading(
        app,
        loop="asyncio",
        http=Protocol,
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,  # Django's
        proxy_headers=False,  # Django knows whom to believe
        server_header=False,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_SECONDS,
        timeout_graceful_shutdown=stop_seconds,
        **others,
    )


def listener(host: str, port: int, seconds: float = 0.0) -> socket.socket:
    """A bound socket, of whichever family the address is. `OSError` if it can't be had.

    Workers whose parent has died leave an address within a moment; that is waited for, up to `seconds`.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, _, _, _, address = found[0]
    until = time.monotonic() + seconds
    while True:
        try:
            return socket.create_server(address[:2], family=family, backlog=BACKLOG)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() >= until:
                raise
            time.sleep(0.1)


def many_files() -> None:
    """Each client that waits is an open file: allow as many as this process may."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def frugal_malloc() -> None:
    """Tell glibc to share arenas between threads, and to give large blocks back; other allocators are left as they are.

    Left alone it makes up to eight arenas for each core, and each keeps for good what its threads have needed at most at one
    time; and once a large block was freed, it takes such blocks from there, too, and what lies between them stays. With 80
    threads and bodies of some hundred kilobytes memory creeps up for hours. To be called before threads are started.
    """
    if tune := getattr(ctypes.CDLL(None), "mallopt", None):
        tune(M_ARENA_MAX, ARENAS)
        tune(M_MMAP_THRESHOLD, LARGE)
        tune(M_TRIM_THRESHOLD, LARGE)


def load_views() -> None:
    """Django does this with the first request, which would be a slow one."""
    get_resolver().url_patterns  # noqa: B018 - looking at them imports them
