"""What surrounds every request: an id, a head that can be read, and the end of the files that it has staged."""

import re
import uuid
from collections.abc import Callable

from django.conf import settings
from django.core.exceptions import DisallowedHost
from django.http import HttpRequest, HttpResponseBase
from django.utils.http import parse_header_parameters

from fl_server_api.errors import bad_content_type, invalid_host
from fl_server_api.request_log import CURRENT
from fl_server_api.uploads import discard_staged

SANE = re.compile(r"[A-Za-z0-9._-]{8,64}")
SESSION = re.compile(r"[a-z0-9]{1,40}")


class StagedFilesMiddleware:
    """Leaves no upload behind, however the request ended."""

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponseBase]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponseBase:
        try:
            return self.get_response(request)
        finally:
            discard_staged(request)


class RequestIdMiddleware:
    """Takes over a sane id from a proxy or client, else makes one; logs, errors and headers share it."""

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponseBase]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponseBase:
        given = request.headers.get("X-Request-ID", "")
        request_id = given if SANE.fullmatch(given) else uuid.uuid4().hex
        request.META["fl.request_id"] = request_id
        current = CURRENT.set(request)
        try:
            response = self.get_response(request)
        finally:
            CURRENT.reset(current)
        response["X-Request-ID"] = request_id
        return response


class HostMiddleware:
    """Refuses names that are not in ALLOWED_HOSTS before Django does: strangers cost a line, no traceback."""

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponseBase]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponseBase:
        try:
            request.get_host()
        except DisallowedHost:
            return invalid_host(request)
        return self.get_response(request)


class HeadMiddleware:
    """Refuses a `Content-Type` that no parser can read, and forgets a session's cookie that names none.

    Django takes a cookie's value out of its quotes and asks the database for it, which may not know such letters.
    """

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponseBase]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponseBase:
        try:
            parse_header_parameters(request.META.get("CONTENT_TYPE", ""))
        except ValueError:
            return bad_content_type(request)
        if not SESSION.fullmatch(request.COOKIES.get(settings.SESSION_COOKIE_NAME, "")):
            request.COOKIES.pop(settings.SESSION_COOKIE_NAME, None)
        return self.get_response(request)
