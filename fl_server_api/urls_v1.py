"""`/api/v1/` and `/api/` are the same thing; only the latter is in the OpenAPI document."""

from django.urls import include, path

urlpatterns = [
    path("v1/", include("fl_server_api.urls")),
    path("", include("fl_server_api.urls")),
]
