"""How often one user, or one address, may ask for what is dear; counted before the body is read."""

import logging
import time
from dataclasses import dataclass

from django.conf import settings
from django.core.cache import cache
from django.http import HttpRequest
from rest_framework.exceptions import Throttled
from rest_framework.request import Request

from fl_server_api.guessing import AWAY, address
from fl_server_core.models import User
from fl_server_core.selectors import is_admin
from fl_server_core.services.tokens import keyed_digest

log = logging.getLogger("fl.server")


@dataclass(frozen=True)
class Rate:
    """One kind of request. `setting` holds (how often, in how many seconds); 0 times is no limit.

    Each period begins anew for everybody. The cache that all processes share holds the counts; where it
    is away, nobody is stopped.
    """

    setting: str
    what: str
    by_address: bool = False

    def count(self, request: Request | HttpRequest) -> None:
        """One more; `Throttled` (429, until the period ends) if these are too many."""
        most, seconds = getattr(settings, self.setting)
        if not most:
            return
        now = time.time()
        who = self._who(request)
        name = keyed_digest("rates", f"{self.setting}\n{who}\n{int(now // seconds)}")
        if _counted(f"rate:{name}", seconds) > most:
            said = f"more than {most:,} {self.what} in {seconds:,} s"
            raise Throttled(wait=seconds - now % seconds, detail=said)

    def _who(self, request: Request | HttpRequest) -> str:
        if self.by_address:
            return address(request._request if isinstance(request, Request) else request)
        return str(request.user.pk)


@dataclass(frozen=True)
class StrangersRate(Rate):
    """One that admins are exempt from."""

    def count(self, request: Request | HttpRequest) -> None:
        if not (isinstance(request.user, User) and is_admin(request.user)):
            super().count(request)


def _counted(key: str, seconds: int) -> int:
    """How many there are now; 0 if that can't be known."""
    try:
        if cache.add(key, 1, seconds):
            return 1
        return cache.incr(key)
    except ValueError:  # forgotten between the two
        return 0
    except AWAY as error:
        log.warning("requests are not counted: %s", error)
        return 0


PASSWORDS = Rate("FL_RATE_PASSWORDS", "passwords from your address", by_address=True)
REGISTRATIONS = StrangersRate(
    "FL_RATE_REGISTRATIONS", "registrations from your address", by_address=True
)
TOKENS = Rate("FL_RATE_TOKENS", "new tokens")
UPLOADS = Rate("FL_RATE_UPLOADS", "uploads")
INFERENCES = Rate("FL_RATE_INFERENCES", "questions to models")
