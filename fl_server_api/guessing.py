"""Stops people who guess at passwords, before each guess costs a slow hash."""

import ipaddress
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import redis
from django.conf import settings
from django.core.cache import cache
from django.http import HttpRequest
from rest_framework.exceptions import Throttled

from fl_server_core.services.tokens import keyed_digest

log = logging.getLogger("fl.server")
GUESSES = 10  # wrong passwords for one user name from one address
SECONDS = 300
GUESSES_IN_ALL = (
    2_000  # the same from all unknown addresses; more than sixteen come to in that time
)
SECONDS_IN_ALL = 3_600
KNOWN_SECONDS = 30 * 86_400  # how long such an address is known
NETWORK_BITS = 64
AWAY = (redis.RedisError, OSError)


@dataclass(frozen=True)
class Tally:
    """How many there were since the first of them; `seconds` after it all are forgotten."""

    key: str
    most: int
    seconds: int

    @property
    def keys(self) -> tuple[str, str]:
        return self.key, f"{self.key}:until"

    def wait(self, found: Mapping[str, Any]) -> float:
        """Seconds until all are forgotten if there were too many, else 0.0; `found` are the values of `keys`."""
        count, until = self.keys
        if found.get(count, 0) < self.most:
            return 0.0
        left: float = found.get(until, 0.0) - time.time()
        return max(1.0, min(left, self.seconds))

    def add(self) -> None:
        """One more. ValueError if they were forgotten just now."""
        count, until = self.keys
        if cache.add(count, 1, self.seconds):
            cache.set(until, time.time() + self.seconds, self.seconds)
        else:
            cache.incr(count)


class Guesses:
    """The wrong passwords for one name, from one address and from all, in the cache that all processes share.

    Who guesses from many addresses has two thousand an hour. So that he doesn't lock the owner out, addresses that the
    right password came from go on when these are used up, and what is wrong from there uses up none of them. Where the
    cache is away, nobody is stopped: it holds no truth, and people must be able to log in. What it forgets is unknown.
    """

    def __init__(self, request: HttpRequest, name: str) -> None:
        here = f"{address(request)}\n{name}"
        self._here = Tally("guesses:" + keyed_digest("guesses", here), GUESSES, SECONDS)
        in_all = "guesses:" + keyed_digest("guesses", f"\n{name}")
        self._in_all = Tally(in_all, GUESSES_IN_ALL, SECONDS_IN_ALL)
        self._known = "known:" + keyed_digest("guesses", here)
        self._is_known = False

    def check(self) -> None:
        """Raise `Throttled` (429 with `Retry-After`) after too many."""
        try:
            found = cache.get_many([*self._here.keys, *self._in_all.keys, self._known])
        except AWAY as error:
            log.warning("wrong passwords are not counted: %s", error)
            return
        wait = self._here.wait(found)
        self._is_known = self._known in found
        if not self._is_known:
            wait = max(wait, self._in_all.wait(found))
        if wait:
            raise Throttled(wait=wait, detail="too many wrong passwords.")

    def count(self) -> None:
        """One more, after `check`. The first begins the time after which all are forgotten."""
        for tally in [self._here] if self._is_known else [self._here, self._in_all]:
            try:
                tally.add()
            except ValueError:  # forgotten between two questions
                continue
            except AWAY as error:
                log.warning("wrong passwords are not counted: %s", error)
                return

    def forget(self) -> None:
        """It was the right one: those from here are forgotten, and its owner is known here."""
        try:
            cache.delete(self._here.key)
            cache.set(self._known, 1, KNOWN_SECONDS)
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
