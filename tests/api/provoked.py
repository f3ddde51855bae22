"""Which refusals the tests have really been answered with, over HTTP."""

import json
from collections.abc import Callable
from typing import Any

from django.core.handlers.base import BaseHandler
from django.http import HttpRequest

PROVOKED: set[tuple[int, str]] = set()


def record(original: Callable[[BaseHandler, HttpRequest], Any]) -> Callable[..., Any]:
    """Django's handler, which notes the status and the code of every refusal that it gives."""

    def get_response(self: BaseHandler, request: HttpRequest) -> Any:
        response = original(self, request)
        said = "" if response.streaming else response.headers.get("Content-Type", "")
        if response.status_code >= 400 and said.startswith("application/json"):
            code = json.loads(response.content).get("code")
            PROVOKED.add((response.status_code, code))
        return response

    return get_response
