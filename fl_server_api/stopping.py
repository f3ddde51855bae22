"""What a server that stops and views that answer without end say to each other."""

from threading import Event

from rest_framework.request import Request

STOP = "fl.stop"  # in a request's META; no client can put it there: headers begin with HTTP_


def stop_of(request: Request) -> Event:
    """Set when the server stops; never under a server that doesn't tell."""
    found = request._request.META.get(STOP)
    return found if isinstance(found, Event) else Event()
