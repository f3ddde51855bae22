"""HTTP POST, for https and (where private addresses are allowed, say) http endpoints."""

import ssl

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


@TRANSPORTS.register("http")
@TRANSPORTS.register("https")
class HttpsTransport(Transport):
    """One connection a message, no redirects, no proxies, every wait bounded."""

    def deliver(self, message: Message) -> int:
        timeout = {
            "connect": settings.FL_WEBHOOK_CONNECT_SECONDS,
            "read": settings.FL_WEBHOOK_READ_SECONDS,
            "write": settings.FL_WEBHOOK_READ_SECONDS,
            "pool": settings.FL_WEBHOOK_CONNECT_SECONDS,
        }
        try:
            with (
                httpcore.ConnectionPool(
                    ssl_context=ssl.create_default_context(), network_backend=GuardedBackend()
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
        except (
            httpcore.TimeoutException,
            httpcore.NetworkError,
            httpcore.ProtocolError,
            OSError,
        ) as error:
            raise Unreachable(f"{type(error).__name__}: {error}") from error
        except (httpcore.UnsupportedProtocol, ValueError) as error:
            raise Rejected(f"BAD_ENDPOINT: {error}") from error
        if not 200 <= status < 300:
            raise Rejected(f"answered {status}", status)
        return status
