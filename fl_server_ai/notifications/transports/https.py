"""HTTP POST, for https and (where private addresses are allowed, say) http endpoints."""

import contextlib
import ssl
from functools import cache

import httpcore
from django.conf import settings

from fl_server_ai.notifications.guard import GuardedBackend
from fl_server_ai.notifications.transports import (
    TRANSPORTS,
    Message,
    Rejected,
    Transport,
    Unreachable,
)

MAX_ANSWER = 65_536
NO_ANSWER = (httpcore.TimeoutException, httpcore.NetworkError, httpcore.ProtocolError, OSError)


@cache
def tls() -> ssl.SSLContext:
    """Reading the system's certificates takes longer than a delivery: once a process."""
    return ssl.create_default_context()


@TRANSPORTS.register("http")
@TRANSPORTS.register("https")
class HttpsTransport(Transport):
    """One connection a message, no redirects, no proxies; connecting and reading together are bounded."""

    def deliver(self, message: Message) -> int:
        if not message.url.isascii():
            raise Rejected("BAD_ENDPOINT: the address has to be written in ASCII (punycode)")
        connect, read = settings.FL_WEBHOOK_CONNECT_SECONDS, settings.FL_WEBHOOK_READ_SECONDS
        timeout = {"connect": connect, "read": read, "write": read, "pool": connect}
        try:
            with (
                httpcore.ConnectionPool(
                    ssl_context=tls(), network_backend=GuardedBackend(connect + read)
                ) as pool,
                pool.stream(
                    "POST",
                    message.url,
                    headers=list(message.headers.items()),
                    content=message.body,
                    extensions={"timeout": timeout},
                ) as answer,
            ):
                status = int(answer.status)
                _hear_out(answer)
        except NO_ANSWER as error:
            raise Unreachable(f"{type(error).__name__}: {error}") from error
        except (httpcore.UnsupportedProtocol, ValueError) as error:
            raise Rejected(f"BAD_ENDPOINT: {error}") from error
        if not 200 <= status < 300:
            raise Rejected(f"answered {status}", status)
        return status


def _hear_out(answer: httpcore.Response) -> None:
    """Read a little, so that a receiver isn't cut off in mid-sentence. Its status has said it all."""
    size = 0
    with contextlib.suppress(*NO_ANSWER):
        for chunk in answer.iter_stream():
            size += len(chunk)
            if size > MAX_ANSWER:
                return
