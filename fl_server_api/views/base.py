"""What every view shares: protocol, size limit, parsers, and how errors are documented."""

from collections.abc import Mapping
from typing import Any, ClassVar

from django.conf import settings
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.serializers import Serializer
from rest_framework.views import APIView

from fl_server_api.compression import ACCEPTED, unpack
from fl_server_api.errors import UpgradeRequired
from fl_server_api.parsers import FormParser, StrictJSONParser, StrictMultiPartParser
from fl_server_api.serializers.common import ErrorOutput
from fl_server_api.throttling import Rate
from fl_server_api.transfers import admit
from fl_server_api.uploads import refuse_large

MIN_PROTOCOL = 1


class View(APIView):
    """Checks what can be known before the body is read."""

    parser_classes = [StrictJSONParser, FormParser, StrictMultiPartParser]
    rates: ClassVar[Mapping[str, Rate]] = {}  # by method

    def initial(self, request: Request, *args: Any, **kwargs: Any) -> None:
        protocol = request.headers.get("X-FL-Protocol", "")
        if protocol.isdecimal() and len(protocol) < 9 and int(protocol) < MIN_PROTOCOL:
            raise UpgradeRequired(
                f"protocol {protocol} is no longer spoken here; update to {MIN_PROTOCOL} or newer"
            )
        unpack(request)
        refuse_large(request, settings.FL_MAX_MODEL_BYTES)  # whoever it is
        super().initial(request, *args, **kwargs)
        rate = self.rates.get(request.method or "")
        if rate is not None:
            rate.count(request)
        refuse_large(request)
        admit(request)

    def finalize_response(
        self, request: Request, response: Any, *args: Any, **kwargs: Any
    ) -> Response:
        answer = super().finalize_response(request, response, *args, **kwargs)
        answer.headers.setdefault("Accept-Encoding", ACCEPTED)  # RFC 7694: of requests
        return answer


def parsed(kind: type[Serializer[Any]], request: Request) -> dict[str, Any]:
    """The request's body as `kind` describes it; a refusal names every field that is wrong."""
    body = kind(data=request.data)
    body.is_valid(raise_exception=True)
    result: dict[str, Any] = body.validated_data
    return result


def answers(success: dict[Any, Any], *statuses: int) -> dict[Any, Any]:
    """A route's documented answers: its successes, these refusals, and those of every route."""
    refusals = {*statuses, 401, 403, 413, 426, 429}
    return {**success, **dict.fromkeys(sorted(refusals), ErrorOutput)}
