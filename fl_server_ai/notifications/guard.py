"""Where webhooks may go: names are resolved here once, and the address that was checked is connected to."""

import ipaddress
import queue
import socket
import threading
import time
import typing
from collections.abc import Iterable

import httpcore
from django.conf import settings

from fl_server_ai.notifications.transports import Rejected

NAT64 = ipaddress.ip_network("64:ff9b::/96")
ROUTED = ipaddress.ip_network("2000::/3")  # whatever else IPv6 has is not the internet
DOCUMENTATION = ipaddress.ip_network("3fff::/20")
MAX_ADDRESSES = 4  # tried one after the other
SocketOption = typing.Any
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def is_public(address: str) -> bool:
    """Whether an address is on the open internet, looking through IPv6 forms that wrap an IPv4 one."""
    found = ipaddress.ip_address(address.split("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour
        if found in NAT64:
            inner = ipaddress.IPv4Address(int(found) & 0xFFFF_FFFF)
        if inner is not None:
            return is_public(str(inner))
        if found not in ROUTED or found in DOCUMENTATION:
            return False
    return found.is_global and not found.is_multicast


def is_allowed(host: str, address: str) -> bool:
    """Whether FL_WEBHOOK_ALLOW names this address, or this host: then all but link-local addresses.

    What is no route to a host, like multicast, never is.
    """
    found: Address = ipaddress.ip_address(address.split("%")[0])
    if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped:
        found = found.ipv4_mapped
    if found.is_multicast or found.is_unspecified:
        return False
    places = settings.FL_WEBHOOK_ALLOW
    if any(found in network for network in places.networks):
        return True
    named = host.lower().rstrip(".")
    listed = any(f".{named}".endswith(n) if n[0] == "." else named == n for n in places.names)
    return listed and not found.is_link_local  # there the metadata services of clouds are


def checked_addresses(host: str, port: int, seconds: float) -> list[str]:
    """The addresses of `host`. One where nothing may go refuses them all, before anything connects."""
    addresses = _resolve(host, port, seconds)
    if not settings.FL_WEBHOOK_ALLOW_PRIVATE:
        for address in addresses:
            if not is_public(address) and not is_allowed(host, address):
                what = address if host == address else f"{host} is {address}, which"
                raise Rejected(
                    f"ADDRESS_REFUSED: {what} is not public; the server's operator may allow it "
                    "(FL_WEBHOOK_ALLOW)"
                )
    return addresses[:MAX_ADDRESSES]


def _resolve(host: str, port: int, seconds: float) -> list[str]:
    """Ask the resolver, in a thread that is left alone when it takes longer: it has no timeout."""
    answers: queue.SimpleQueue[list[str] | Exception] = queue.SimpleQueue()

    def ask() -> None:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, ValueError) as error:
            answers.put(error)
        else:
            answers.put([str(entry[4][0]) for entry in found])

    threading.Thread(target=ask, daemon=True, name="fl-webhook-name").start()
    try:
        answer = answers.get(timeout=max(seconds, 0.0))
    except queue.Empty as error:
        raise httpcore.ConnectTimeout(f"{host} was not resolved in time") from error
    if isinstance(answer, OSError):
        raise httpcore.ConnectError(f"{host} has no address: {answer}") from answer
    if isinstance(answer, Exception):
        raise Rejected(f"BAD_ENDPOINT: {host[:100]!r} is no host name") from answer
    return answer


class GuardedBackend(httpcore.SyncBackend):
    """Connects to the address that was checked, so that a name can't change its mind in between.

    `seconds` bound the whole exchange, however slowly the other side drips.
    """

    def __init__(self, seconds: float) -> None:
        self._deadline = time.monotonic() + seconds

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[SocketOption] | None = None,
    ) -> httpcore.NetworkStream:
        addresses = checked_addresses(host, port, _left(self._deadline, timeout))
        for number, address in enumerate(addresses, start=1):
            seconds = _left(self._deadline, timeout)
            try:
                stream = super().connect_tcp(address, port, seconds, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                if number == len(addresses):
                    raise
            else:
                return BoundedStream(stream, self._deadline)
        raise httpcore.ConnectError(f"{host} has no address")


class BoundedStream(httpcore.NetworkStream):
    """A connection that is cut at a deadline."""

    def __init__(self, stream: httpcore.NetworkStream, deadline: float) -> None:
        self._stream = stream
        self._deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, _left(self._deadline, timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, _left(self._deadline, timeout))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self,
        ssl_context: typing.Any,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.NetworkStream:
        seconds = _left(self._deadline, timeout)
        return BoundedStream(
            self._stream.start_tls(ssl_context, server_hostname, seconds), self._deadline
        )

    def get_extra_info(self, info: str) -> typing.Any:
        return self._stream.get_extra_info(info)


def _left(deadline: float, timeout: float | None) -> float:
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise httpcore.ReadTimeout("the whole exchange took too long")
    return seconds if timeout is None else min(seconds, timeout)
