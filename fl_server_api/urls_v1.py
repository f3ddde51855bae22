"""`/api/v1/` and `/api/` are the same thing; only the latter is in the OpenAPI document."""

from typing import Any

from django.urls import include, path

urlpatterns = [
    path("v1/", include("fl_server_api.urls")),
    path("", include("fl_server_api.urls")),
]


def without_v1(endpoints: list[Any]) -> list[Any]:
    """A hook for drf-spectacular."""
    return [entry for entry in endpoints if not entry[0].startswith("/api/v1/")]
