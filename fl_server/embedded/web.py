"""The WSGI server of `manage.py serve`: cheroot, tuned for long-polls and long uploads."""

import logging
import ssl
import threading
from collections.abc import Callable
from typing import Any

from cheroot import wsgi
from cheroot.ssl.builtin import BuiltinSSLAdapter

from fl_server.embedded.tls import Certificates

log = logging.getLogger("fl.server")
STOP_SECONDS = 2
STALLED_SECONDS = 30  # of silence within a request, and between two of a kept connection


class LazyTLS(BuiltinSSLAdapter):
    """Leaves the handshake to the thread that reads: a client that stalls in it stops nobody else."""

    def __init__(self, certificate: str, private_key: str) -> None:
        super().__init__(certificate, private_key)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2

    def wrap(self, sock: Any) -> tuple[Any, dict[str, str]]:
        wrapped = self.context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
        return wrapped, {"wsgi.url_scheme": "https", "HTTPS": "on"}


class Connection(wsgi.Server.ConnectionClass):  # type: ignore[misc]
    """Shakes hands before its first request; who fails at that is dropped without a word."""

    shaken = False

    def communicate(self) -> bool:
        if not self.shaken and isinstance(self.socket, ssl.SSLSocket):
            try:
                self.socket.do_handshake()
            except OSError as error:  # ssl.SSLError is one: a wrong CA, plain HTTP, a port scan
                log.debug("TLS handshake with %s failed: %s", self.remote_addr, error)
                return False
        self.shaken = True
        return bool(super().communicate())


class Web(wsgi.Server):
    """Serves `app` in a thread of its own until `stop()`."""

    ConnectionClass = Connection

    def __init__(
        self,
        bind: tuple[str, int],
        app: Callable[..., Any],
        *,
        threads: int,
        tls: Certificates | None,
    ) -> None:
        super().__init__(
            bind,
            app,
            numthreads=threads,
            max=threads,  # cheroot never grows by itself; an idle thread costs about 20 KiB
            server_name="fl",
            request_queue_size=256,
            timeout=STALLED_SECONDS,
            shutdown_timeout=STOP_SECONDS,
        )
        self.version = "FL"
        self.keep_alive_conn_limit = 512
        self.max_request_header_size = 64 * 2**10
        self.max_request_body_size = 0  # bodies stream; the views know the limits
        if tls is not None:
            self.ssl_adapter = LazyTLS(str(tls.server), str(tls.key))
        self._thread = threading.Thread(target=self.serve, daemon=True, name="web")

    def open(self) -> None:
        """Bind and answer. `OSError` if the address can't be had."""
        self.prepare()
        self._thread.start()

    def close(self) -> None:
        """Stop, waiting a few seconds at most; what then still runs ends with the process."""
        stopping = threading.Thread(target=self.stop, daemon=True, name="stop")
        stopping.start()
        stopping.join(2 * STOP_SECONDS)

    def error_log(self, msg: str = "", level: int = 20, traceback: bool = False) -> None:
        """To the log instead of stderr; a client that hangs up is no news."""
        log.log(level if level >= logging.WARNING else logging.DEBUG, msg, exc_info=traceback)
