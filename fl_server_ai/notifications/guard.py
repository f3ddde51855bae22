"""Where webhooks may go: names are resolved here once, and the address that was checked is connected to."""

import ipaddress
import socket
import typing
from collections.abc import Iterable

import httpcore
from django.conf import settings

from fl_server_ai.notifications.transports import Rejected

NAT64 = ipaddress.ip_network("64:ff9b::/96")
SocketOption = typing.Any


def is_public(address: str) -> bool:
    """Whether an address is on the open internet, looking through IPv6 forms that wrap an IPv4 one."""
    found = ipaddress.ip_address(address.split("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour
        if found in NAT64:
            inner = ipaddress.IPv4Address(int(found) & 0xFFFF_FFFF)
        if inner is not None:
            return is_public(str(inner))
    return found.is_global and not found.is_multicast


def checked_address(host: str, port: int) -> str:
    """An address of `host` to connect to. One that is not public refuses them all."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [str(entry[4][0]) for entry in found]
    if not settings.FL_WEBHOOK_ALLOW_PRIVATE:
        for address in addresses:
            if not is_public(address):
                raise Rejected(f"ADDRESS_REFUSED: {host} is {address}, which is not public")
    return addresses[0]


class GuardedBackend(httpcore.SyncBackend):
    """Connects to the address that was checked, so that a name can't change its mind in between."""

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[SocketOption] | None = None,
    ) -> httpcore.NetworkStream:
        try:
            address = checked_address(host, port)
        except OSError as error:
            raise httpcore.ConnectError(f"{host} has no address: {error}") from error
        return super().connect_tcp(address, port, timeout, local_address, socket_options)
