"""Stops people who guess at passwords, before each guess costs a slow hash."""

import ipaddress
import logging
import time

import redis
from django.conf import settings
from django.core.cache import cache
from django.http import HttpRequest
from rest_framework.exceptions import Throttled

from fl_server_core.services.tokens import keyed_digest

log = logging.getLogger("fl.server")
GUESSES = 10  # wrong passwords for one user name from one address
SECONDS = 300
NETWORK_BITS = 64
AWAY = (redis.RedisError, OSError)


class Guesses:
    """The wrong passwords for one name from one address, counted in the cache that all processes share.

    Where that is away, nobody is stopped: it holds no truth, and people must be able to log in.
    """

    def __init__(self, request: HttpRequest, name: str) -> None:
        self._count = "guesses:" + keyed_digest("guesses", f"{address(request)}\n{name}")
        self._until = f"{self._count}:until"

    def check(self) -> None:
        """Raise `Throttled` (429 with `Retry-After`) after too many."""
        try:
            found = cache.get_many([self._count, self._until])
        except AWAY as error:
            log.warning("wrong passwords are not counted: %s", error)
            return
        if found.get(self._count, 0) >= GUESSES:
            left = found.get(self._until, 0.0) - time.time()
            raise Throttled(wait=max(1.0, min(left, SECONDS)), detail="too many wrong passwords.")

    def count(self) -> None:
        """One more. The first begins the time after which all are forgotten."""
        try:
            if cache.add(self._count, 1, SECONDS):
                cache.set(self._until, time.time() + SECONDS, SECONDS)
            else:
                cache.incr(self._count)
        except ValueError:  # forgotten between the two
            return
        except AWAY as error:
            log.warning("wrong passwords are not counted: %s", error)

    def forget(self) -> None:
        """It was the right one."""
        try:
            cache.delete(self._count)
        except AWAY as error:
            log.warning("wrong passwords are not counted: %s", error)


def address(request: HttpRequest) -> str:
    """Where a request comes from; behind a proxy that is trusted for the scheme, what it says last.

    Of IPv6 the network: one customer has 2^64 addresses in it, and may take another for each guess.
    """
    found = str(request.META.get("REMOTE_ADDR", ""))
    if settings.SECURE_PROXY_SSL_HEADER:
        found = request.headers.get("X-Forwarded-For", "").rpartition(",")[2].strip() or found
    try:
        known = ipaddress.IPv6Address(found)
    except ValueError:
        return found
    inner = known.ipv4_mapped
    return str(inner or ipaddress.IPv6Network((int(known), NETWORK_BITS), strict=False))
