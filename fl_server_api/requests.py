"""Requests with a `Content-Type` at which Django's own class raises, before anything could answer."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from django.core.handlers.wsgi import WSGIHandler, WSGIRequest
from django.core.wsgi import get_wsgi_application
from django.utils.http import parse_header_parameters


class Request(WSGIRequest):
    """One that can be made of any head: `HeadMiddleware` refuses the `Content-Type` that was not understood."""

    def _set_content_type_params(self, meta: Mapping[str, Any]) -> None:
        self.content_type, self.content_params = "", {}
        with suppress(ValueError):
            self.content_type, self.content_params = parse_header_parameters(
                meta.get("CONTENT_TYPE", "")
            )
        charset = self.content_params.get("charset")
        if charset:
            # Some codecs are no text, or can't skip what is none: a charset of those is ignored, as an unknown one is.
            with suppress(LookupError, ValueError):
                b"\xff".decode(charset, "replace")
                self._encoding = charset  # its setter would parse the query, which may raise


def wsgi_application() -> WSGIHandler:
    """Django's, which makes its requests of this class."""
    application = get_wsgi_application()
    application.request_class = Request
    return application
