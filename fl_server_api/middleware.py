"""What surrounds every request: an id, a host that is served, and the end of the files that it has staged."""

import re
import uuid
from collections.abc import Callable

from django.core.exceptions import DisallowedHost
from django.http import HttpRequest, HttpResponseBase

from fl_server_api.errors import invalid_host
from fl_server_api.request_log import CURRENT
from fl_server_api.uploads import discard_staged

SANE = re.compile(r"[A-Za-z0-9._-]{8,64}")


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
