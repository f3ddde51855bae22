"""Where the server is: its origin, which URLs belong to it, and what secures the way there."""

import ipaddress
import socket
import ssl
from pathlib import Path

import httpx

from fl_client.errors import ConnectionFailed, FLError


class Address:
    """A server's base URL; a trailing `/api` or `/api/v1` is allowed and means the same."""

    def __init__(self, url: str) -> None:
        parsed = httpx.URL(url)
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise ValueError(f"{url!r} is no http or https address")
        if parsed.userinfo:
            raise ValueError("give the token as token=, not within the URL; URLs end up in logs")
        path = parsed.path.rstrip("/")
        if not path.endswith(("/api", "/api/v1")):
            path += "/api"
        self.api = parsed.copy_with(path=path + "/", query=None, fragment=None)

    def resolve(self, url: str) -> httpx.URL:
        """`trainings/` below the API, `/api/...` below the origin, a full URL as it is."""
        try:
            target = self.api.join(url)
        except httpx.InvalidURL:
            target = None
        if target is None or target.scheme not in ("http", "https") or not target.host:
            raise FLError(0, "BAD_URL", f"{url!r} is no address to ask")
        return target

    def owns(self, url: httpx.URL) -> bool:
        """Whether credentials may travel to this URL."""
        return _origin(url) == _origin(self.api)

    @property
    def loopback(self) -> bool:
        host = self.api.host
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return host == "localhost" or host.endswith(".localhost")


def _origin(url: httpx.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port or {"http": 80, "https": 443}.get(url.scheme)


def trust(address: Address, ca: str | Path | None) -> ssl.SSLContext | bool:
    """What httpx verifies with: only `ca` where one is given, else the public authorities.

    ConnectionFailed (CA_FILE) if that file can't be read or holds no certificate.
    """
    if ca is None:
        return True
    if address.api.scheme != "https":
        raise ValueError(f"ca= says whom to trust over TLS, but {address.api} is plain http")
    try:
        return ssl.create_default_context(cafile=str(ca))
    except OSError as error:  # ssl.SSLError is one
        why = error.strerror if not isinstance(error, ssl.SSLError) else "no PEM certificate in it"
        raise ConnectionFailed(0, "CA_FILE", f"ca={str(ca)!r} can't be used: {why}") from error


def speaks_tls(host: str, port: int, seconds: float = 5.0) -> bool:
    """Whether a TLS handshake begins there; nothing is sent but its first message, nothing believed."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        with (
            socket.create_connection((host, port), timeout=seconds) as connection,
            context.wrap_socket(connection, server_hostname=host),
        ):
            return True
    except (OSError, ValueError):
        return False
