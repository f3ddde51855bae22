"""The web of `manage.py serve`: uvicorn and the front in a thread of this process."""

import ssl
import threading
from collections.abc import Callable
from typing import Any

from django.conf import settings
from uvicorn import Server

from fl_server.embedded.tls import Certificates
from fl_server.front.app import Front
from fl_server.front.serving import configured, frugal_malloc, listener, load_views, many_files

STOP_SECONDS = 2


class Web:
    """Serves the WSGI application `app` until `close()`."""

    def __init__(
        self,
        bind: tuple[str, int],
        app: Callable[..., Any],
        *,
        threads: int,
        tls: Certificates | None,
    ) -> None:
        self._bind = bind
        self.front = Front(app, threads=threads, transfers=settings.FL_TRANSFER_THREADS)
        self._server = Server(
            configured(
                self.front,
                stop_seconds=STOP_SECONDS,
                access_log=False,
                ssl_context_factory=(lambda *_: _context(tls)) if tls else None,
            )
        )
        self._thread = threading.Thread(target=self._serve, daemon=True, name="web")

    def open(self) -> None:
        """Bind and answer. `OSError` if the address can't be had."""
        frugal_malloc()
        many_files()
        self._socket = listener(*self._bind)
        self.port = int(self._socket.getsockname()[1])
        load_views()
        self._thread.start()

    def close(self) -> None:
        """Stop, waiting a few seconds at most; what then still runs ends with the process."""
        self._server.should_exit = True
        self._thread.join(2 * STOP_SECONDS)
        self.front.end()

    def _serve(self) -> None:
        self._server.run(sockets=[self._socket])


def _context(tls: Certificates) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(tls.server, tls.key)
    return context
