"""What surrounds every request: an id, and the end of the files that it has staged."""

import re
import uuid
from collections.abc import Callable

from django.http import HttpRequest, HttpResponseBase

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
        response = self.get_response(request)
        response["X-Request-ID"] = request_id
        return response
