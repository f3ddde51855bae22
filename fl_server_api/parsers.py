"""JSON bodies that no database or parser trips over."""

import json
from collections.abc import Mapping
from typing import IO, Any

from django.conf import settings
from rest_framework.exceptions import ParseError
from rest_framework.parsers import BaseParser, FormParser, MultiPartParser

from fl_server_core.exceptions import TooLarge

__all__ = ["FormParser", "MultiPartParser", "StrictJSONParser"]


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
            raise TooLarge(f"a JSON body may have {limit:,} bytes")
        try:
            return strict_json(raw.decode())
        except (ValueError, RecursionError) as error:
            raise ParseError(f"this is not valid JSON: {str(error)[:200]}") from error


def strict_json(text: str) -> Any:
    """What `text` says; ValueError or RecursionError for what could not be stored or answered."""
    data = json.loads(text, parse_constant=_refuse)
    again = json.dumps(data, allow_nan=False, ensure_ascii=False)
    again.encode()
    if "\\u0000" in again:
        raise ValueError("NUL characters can't be stored")
    return data


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")
