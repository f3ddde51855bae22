"""How often one user, or one address, may ask for what is dear; counted before the body is read."""

from dataclasses import dataclass

from django.conf import settings
from django.http import HttpRequest
from rest_framework.exceptions import Throttled
from rest_framework.request import Request

from fl_server_api.guessing import address
from fl_server_api.uploads import announced
from fl_server_api.windows import Window
from fl_server_core.models import User
from fl_server_core.selectors import is_admin
from fl_server_core.services.tokens import keyed_digest

SMALL = 2**16  # bytes: a piece of at least so many is worth what it costs


@dataclass(frozen=True)
class Rate:
    """One kind of request. `setting` holds (how often, in how many seconds); 0 times is no limit."""

    setting: str
    what: str
    by_address: bool = False

    def count(self, request: Request | HttpRequest) -> None:
        """One more; `Throttled` (429, with the time until there is room) if these are too many."""
        most, seconds = getattr(settings, self.setting)
        if not most:
            return
        name = keyed_digest("rates", f"{self.setting}\n{self._who(request)}\n{seconds}")
        wait = Window(f"rate:{name}", most, seconds).take()
        if wait:
            raise Throttled(wait=wait, detail=f"more than {most:,} {self.what} in {seconds:,} s.")

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


@dataclass(frozen=True)
class SmallPiecesRate(Rate):
    """Only pieces that bring little: whoever sends a large file over a bad line is not stopped."""

    def count(self, request: Request | HttpRequest) -> None:
        if not isinstance(request, Request) or announced(request) < SMALL:
            super().count(request)


PASSWORDS = Rate("FL_RATE_PASSWORDS", "passwords from your address", by_address=True)
REGISTRATIONS = StrangersRate(
    "FL_RATE_REGISTRATIONS", "registrations from your address", by_address=True
)
TOKENS = Rate("FL_RATE_TOKENS", "new tokens")
UPLOADS = Rate("FL_RATE_UPLOADS", "uploads")
PIECES = SmallPiecesRate("FL_RATE_PIECES", f"pieces of uploads below {SMALL:,} bytes")
INFERENCES = Rate("FL_RATE_INFERENCES", "questions to models")
