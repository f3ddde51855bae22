"""Lists: plain arrays, pages on request, filters and ordering by query parameters."""

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from django.core.exceptions import ValidationError
from django.db.models import Model, QuerySet
from drf_spectacular.utils import OpenApiParameter
from rest_framework.pagination import PageNumberPagination
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.serializers import BaseSerializer

from fl_server_core.exceptions import Invalid


class Pages(PageNumberPagination):
    """Only used when `page` or `page_size` is given."""

    page_size = 100
    page_size_query_param = "page_size"
    max_page_size = 1000

    def get_page_size(self, request: Request) -> int | None:
        """At most `max_page_size`, also for more; what is no number from 1 is refused."""
        asked = request.query_params.get("page_size", str(self.page_size))
        try:
            number = int(asked)
        except ValueError:
            number = 0
        if number < 1:
            raise Invalid("page_size is a whole number from 1")
        return min(number, self.max_page_size)

    def asked(self, request: Request, rows: QuerySet[Any, Any]) -> list[Any] | None:
        """The page's rows; None if all are wanted."""
        if not request.query_params.keys() & {"page", "page_size"}:
            return None
        return self.paginate_queryset(rows, request)


FROM_1 = {"type": "integer", "minimum": 1}
PAGING = [
    OpenApiParameter("page", FROM_1, description="Answer in pages: `count next previous results`."),
    OpenApiParameter("page_size", FROM_1, description="Rows on a page, at most 1000."),
]


def parameters(filters: Mapping[str, str], ordering: Sequence[str] = ()) -> list[OpenApiParameter]:
    """What `listed` takes, for the OpenAPI document."""
    own = [OpenApiParameter(name, str) for name in filters]
    if ordering:
        either = [sign + name for name in ordering for sign in ("", "-")]
        own.append(OpenApiParameter("ordering", str, enum=either, description="Minus: descending."))
    return [*PAGING, *own]


def listed(
    request: Request,
    rows: QuerySet[Any, Any],
    serializer: type[BaseSerializer[Any]],
    *,
    filters: Mapping[str, str] | None = None,
    ordering: Sequence[str] = (),
) -> Response:
    """Filter, order and answer. An unknown value finds nothing; an unknown ordering is refused."""
    rows = filtered(request, rows, filters or {})
    order = request.query_params.get("ordering")
    if ordering and order is not None:
        if order.removeprefix("-") not in ordering:
            raise Invalid(f"ordering is one of {', '.join(ordering)}", code="BAD_ORDERING")
        rows = rows.order_by(order, "pk")
    context = {"request": request}
    pages = Pages()
    page = pages.asked(request, rows)
    if page is not None:
        return pages.get_paginated_response(serializer(page, many=True, context=context).data)
    return Response(serializer(rows, many=True, context=context).data)


def filtered(
    request: Request, rows: QuerySet[Any, Any], filters: Mapping[str, str]
) -> QuerySet[Any, Any]:
    """Only what the query's parameters ask for."""
    for name, lookup in filters.items():
        if name in request.query_params:
            rows = _filtered(rows, lookup, request.query_params[name])
    return rows


def _filtered(rows: QuerySet[Any, Any], lookup: str, value: str) -> QuerySet[Any, Any]:
    model: type[Model] = rows.model
    field: Any = model._meta.get_field(lookup.split("__")[0])
    kind = (
        field.target_field.get_internal_type() if field.is_relation else field.get_internal_type()
    )
    try:
        wanted: Any = value
        if kind == "UUIDField":
            wanted = uuid.UUID(value)
        elif "Integer" in kind:
            wanted = int(value)
            if not 0 <= wanted < 2**31:
                return rows.none()
        elif "\x00" in value:
            return rows.none()
        return rows.filter(**{lookup: wanted})
    except (ValueError, ValidationError):
        return rows.none()
