"""Bodies that no database or parser trips over, and none that is taken for another."""

import json
from collections.abc import Mapping
from typing import IO, Any

from django.conf import settings
from rest_framework.exceptions import ParseError
from rest_framework.parsers import BaseParser, FormParser, MultiPartParser

from fl_server_api.uploads import announced
from fl_server_core.exceptions import TooLarge

__all__ = ["FormParser", "StrictJSONParser", "StrictMultiPartParser"]
DEPTH = 500  # levels that are read on any stack, and some more
AROUND = (4, 6, 8)  # bytes of a form without parts, beside its boundary: dashes and line ends


class StrictJSONParser(BaseParser):
    """Refuses what standard JSON has not: NaN, NUL characters, half surrogates, endless nesting."""

    media_type = "application/json"

    def parse(
        self,
        stream: IO[Any],
        media_type: str | None = None,
        parser_context: Mapping[str, Any] | None = None,
    ) -> Any:
        limit = settings.DATA_UPLOAD_MAX_MEMORY_SIZE
        raw = stream.read(limit + 1)
        if len(raw) > limit:
            raise TooLarge(
                f"a JSON body may have {limit:,} bytes; send what is large as a file of a form (multipart)"
            )
        try:
            return strict_json(raw.decode())
        except ValueError as error:
            raise ParseError(f"this JSON can't be read: {str(error)[:200]}") from error


def strict_json(text: str) -> Any:
    """What `text` says; ValueError, with a text for who sent it, for what could not be stored or answered."""
    try:
        data = json.loads(text, parse_constant=_refuse)
        again = json.dumps(data, allow_nan=False, ensure_ascii=False)
    except RecursionError as error:
        raise ValueError(f"it is nested too deeply; {DEPTH} levels are fine") from error
    try:
        again.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(again[error.start]):04x}"
        raise ValueError(f"{half} is half a surrogate pair; a string has both or none") from error
    if "\\u0000" in again:
        raise ValueError("NUL characters can't be stored")
    return data


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


class StrictMultiPartParser(MultiPartParser):
    """Refuses a body without any part that has a name, which Django takes for an empty form."""

    def parse(
        self,
        stream: IO[Any],
        media_type: str | None = None,
        parser_context: Mapping[str, Any] | None = None,
    ) -> Any:
        parsed = super().parse(stream, media_type, parser_context)
        request = (parser_context or {})["request"]
        boundary = request._request.content_params.get("boundary", "")
        empty = not parsed.data and not parsed.files
        if empty and announced(request) not in (0, *(len(boundary) + n for n in AROUND)):
            raise ParseError("this multipart body has no part with a name: is its boundary right?")
        return parsed
