"""Which request a log line belongs to: its id and user, for all lines that are written while it is answered."""

import logging
from contextvars import ContextVar

from django.http import HttpRequest
from django.utils.functional import SimpleLazyObject

CURRENT: ContextVar[HttpRequest | None] = ContextVar("request", default=None)


class RequestFilter(logging.Filter):
    """Gives each record `asked`: "[<request id> <user>] " within a request, else nothing; drops none.

    The user is "-" until he is known: a log line never asks the database.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        # Django writes some lines after the last middleware, but hands their request on.
        request = CURRENT.get() or getattr(record, "request", None)
        record.asked = _asked(request) if isinstance(request, HttpRequest) else ""
        return True


def _asked(request: HttpRequest) -> str:
    request_id = request.META.get("fl.request_id")
    return f"[{request_id} {_user(request)}] " if request_id else ""


def _user(request: HttpRequest) -> str:
    user = vars(request).get("user")
    if type(user) is SimpleLazyObject:  # isinstance would look it up
        user = vars(request).get("_cached_user")
    return (user.get_username() if user is not None else "") or "-"
