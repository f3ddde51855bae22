"""Global models with their versions, and the files behind them."""

from typing import Any

from django.contrib import admin
from django.http import HttpRequest
from django.utils.html import format_html
from django.utils.safestring import SafeString

from fl_server_api.admin.base import (
    DeletedByService,
    HistoryAdmin,
    bytes_text,
    list_link,
    row_link,
)
from fl_server_api.admin.html import table
from fl_server_core.models import Blob, GlobalModel, Metric, ModelVersion, Training, User
from fl_server_core.services.models import model_delete

VERSIONS_SHOWN = 50


def download_link(version: ModelVersion) -> SafeString:
    """Where the API gives out these weights; the browser's session is enough to ask."""
    url = f"/api/models/{version.model_id}/?version={version.number}"
    return format_html('<a href="{}" download>download</a>', url)


@admin.register(GlobalModel)
class GlobalModelAdmin(DeletedByService[GlobalModel]):
    """Name and description can be changed; weights come in over the API only."""

    list_display = ("name", "owner", "round", "weights_size", "type", "container", "created_at")
    list_filter = ("type", "container", "created_at")
    list_select_related = ("owner", "current_version__blob")
    search_fields = ("name", "description", "owner__username", "=id")
    date_hierarchy = "created_at"
    fields = (
        "name",
        "description",
        "owner",
        "used_by",
        "round",
        "type",
        "input_shape",
        "container",
        "preprocessing",
        "created_at",
        "id",
        "versions",
    )
    readonly_fields = fields[2:]

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def service_delete(self, row: GlobalModel, user: User) -> None:
        model_delete(model=row, user=user)

    @admin.display(description="weights")
    def weights_size(self, model: GlobalModel) -> str:
        version = model.current_version
        return bytes_text(version.blob.size if version else None)

    @admin.display(description="training")
    def used_by(self, model: GlobalModel) -> Any:
        return row_link(Training.objects.filter(model=model).first())

    @admin.display(description="versions")
    def versions(self, model: GlobalModel) -> Any:
        newest = list(model.versions.select_related("blob").order_by("-number")[:VERSIONS_SHOWN])
        rows = [
            (
                row_link(version, version.number),
                version.strategy or "uploaded",
                version.num_updates or "-",
                version.total_examples or "-",
                format_html(
                    '<code title="{}">{}…</code>', version.blob.digest, version.blob.digest[:12]
                ),
                bytes_text(version.blob.size),
                version.created_at,
                download_link(version),
            )
            for version in newest
        ]
        heads = ("version", "made by", "updates", "examples", "SHA-256", "size", "made", "")
        return format_html(
            "{}<p>{} &middot; {}</p>",
            table(heads, rows),
            list_link(ModelVersion, "all versions", model__id__exact=model.pk),
            list_link(Metric, "metrics", model__id__exact=model.pk),
        )


@admin.register(ModelVersion)
class ModelVersionAdmin(HistoryAdmin[ModelVersion]):
    list_display = (
        "model_name",
        "number",
        "made_by",
        "num_updates",
        "total_examples",
        "size",
        "created_at",
    )
    list_filter = ("created_at",)
    list_select_related = ("model", "blob")
    search_fields = ("model__name", "=model__id", "=id", "blob__digest")
    ordering = ("-created_at",)
    date_hierarchy = "created_at"
    fields = (
        "model",
        "number",
        "parent",
        "made_by",
        "num_updates",
        "total_examples",
        "blob",
        "digest",
        "size",
        "download",
        "strategy_state",
        "scalars",
        "shared",
        "created_at",
        "id",
    )

    @admin.display(description="model", ordering="model__name")
    def model_name(self, version: ModelVersion) -> str:
        return version.model.name

    @admin.display(description="made by", ordering="strategy")
    def made_by(self, version: ModelVersion) -> str:
        return version.strategy or "uploaded"

    @admin.display(ordering="blob__size")
    def size(self, version: ModelVersion) -> str:
        return bytes_text(version.blob.size)

    @admin.display(description="SHA-256")
    def digest(self, version: ModelVersion) -> str:
        return version.blob.digest

    @admin.display(description="weights")
    def download(self, version: ModelVersion) -> SafeString:
        return download_link(version)


@admin.register(Blob)
class BlobAdmin(HistoryAdmin[Blob]):
    """Rows about files: the files themselves are never opened here."""

    list_display = ("short_digest", "readable_size", "created_at", "doomed_at")
    list_filter = (("doomed_at", admin.EmptyFieldListFilter), "created_at")
    search_fields = ("digest", "name")
    ordering = ("-id",)
    date_hierarchy = "created_at"
    fields = ("digest", "readable_size", "name", "created_at", "doomed_at")

    @admin.display(description="SHA-256", ordering="digest")
    def short_digest(self, blob: Blob) -> str:
        return f"{blob.digest[:16]}…"

    @admin.display(description="size", ordering="size")
    def readable_size(self, blob: Blob) -> str:
        return bytes_text(blob.size)
