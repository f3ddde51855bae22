"""Where the server is: its origin, which URLs belong to it, and what secures the way there."""

import ipaddress
import ssl
from pathlib import Path

import httpx

from fl_client.errors import FLError


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
    """What httpx verifies with: only `ca` where one is given, else the public authorities."""
    if ca is None:
        return True
    if address.api.scheme != "https":
        raise ValueError(f"ca= says whom to trust over TLS, but {address.api} is plain http")
    return ssl.create_default_context(cafile=str(ca))
