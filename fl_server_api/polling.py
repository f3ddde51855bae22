"""What the view of long-polls and a server that can wait without a thread say to each other."""

from dataclasses import dataclass

from django.conf import settings
from rest_framework.request import Request

from fl_server_ai.services.tasks import Look
from fl_server_core.models import User

POLL = "fl.poll"  # in a request's META; no client can put it there: headers begin with HTTP_


@dataclass
class Poll:
    """Put into the environ by the server, filled by the view, which answers at once. No seconds: don't wait."""

    user: str = ""
    seen: int = 0
    seconds: float = 0.0

    def note(self, *, user: User, look: Look, seconds: float) -> None:
        """Say who asks, and how long waiting for a better answer makes sense."""
        self.user, self.seen = str(user.pk), look.seen
        self.seconds = 0.0 if look.final else min(seconds, settings.FL_POLL_SECONDS)


def poll_of(request: Request) -> Poll | None:
    """None under a server that can't wait: then the view does, in its thread."""
    found = request._request.META.get(POLL)
    return found if isinstance(found, Poll) else None
