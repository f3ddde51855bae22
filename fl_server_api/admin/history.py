"""Rounds, tasks, moments, metrics, events, messages, answers: to read, never to change."""

from typing import Any

from django.contrib import admin
from django.db.models import Q, QuerySet
from django.db.models.functions import Length
from django.http import HttpRequest

from fl_server_api.admin.base import HistoryAdmin, list_link
from fl_server_core.models import (
    ClientProfile,
    IdempotencyKey,
    Metric,
    ModelStatistics,
    Notification,
    Round,
    SwagMoments,
    Task,
    TrainerEvent,
    Upload,
    WorkSlice,
)


@admin.register(Round)
class RoundAdmin(HistoryAdmin[Round]):
    list_display = ("model_name", "number", "phase", "started_at", "deadline", "finished_at")
    list_filter = ("phase", "started_at", "deadline")
    list_select_related = ("training__model",)
    search_fields = ("training__model__name", "=training__id")
    ordering = ("-id",)
    date_hierarchy = "started_at"
    fields = (
        "training",
        "number",
        "phase",
        "reason",
        "see",
        "policy",
        "base_version",
        "result_version",
        "warnings",
        "started_at",
        "deadline",
        "finished_at",
    )

    @admin.display(description="training", ordering="training__model__name")
    def model_name(self, round: Round) -> str:
        return round.training.model.name

    @admin.display(description="see also")
    def see(self, round: Round) -> Any:
        return list_link(Task, "tasks of this round", round__id__exact=round.pk)


@admin.register(Task)
class TaskAdmin(HistoryAdmin[Task]):
    list_display = ("user", "kind", "number", "state", "model_name", "created_at", "finished_at")
    list_filter = ("state", "kind", "created_at")
    list_select_related = ("user", "round__training__model")
    search_fields = ("user__username", "round__training__model__name", "=round__training__id")
    ordering = ("-created_at",)
    date_hierarchy = "created_at"
    fields = (
        "round",
        "user",
        "kind",
        "number",
        "state",
        "attempt",
        "not_before",
        "failure",
        "progress",
        "created_at",
        "fetched_at",
        "progress_at",
        "finished_at",
        "id",
    )

    @admin.display(description="training", ordering="round__training__model__name")
    def model_name(self, task: Task) -> str:
        return task.round.training.model.name


@admin.register(ClientProfile)
class ClientProfileAdmin(HistoryAdmin[ClientProfile]):
    list_display = ("user", "num_examples", "sdk_version", "joined_at")
    list_select_related = ("user",)
    search_fields = ("user__username",)
    ordering = ("-joined_at",)
    fields = (
        "user",
        "num_examples",
        "capabilities",
        "attributes",
        "sdk_version",
        "joined_at",
    )


@admin.register(SwagMoments)
class SwagMomentsAdmin(HistoryAdmin[SwagMoments]):
    list_display = ("owner", "model_name", "round_number", "sample_size", "created_at")
    list_filter = ("created_at",)
    list_select_related = ("owner", "round", "training__model")
    search_fields = ("owner__username", "training__model__name", "=training__id", "=id", "digest")
    ordering = ("-created_at",)
    date_hierarchy = "created_at"
    fields = (
        "training",
        "round",
        "owner",
        "sample_size",
        "first",
        "second",
        "deviations",
        "digest",
        "created_at",
        "id",
    )

    @admin.display(description="training", ordering="training__model__name")
    def model_name(self, moments: SwagMoments) -> str:
        return moments.training.model.name

    @admin.display(description="round", ordering="round__number")
    def round_number(self, moments: SwagMoments) -> int:
        return moments.round.number


@admin.register(ModelStatistics)
class ModelStatisticsAdmin(HistoryAdmin[ModelStatistics]):
    list_display = ("key", "counted", "created_at")
    list_filter = ("created_at",)
    search_fields = ("key", "of_models__name", "=of_models__id")
    ordering = ("-created_at",)
    date_hierarchy = "created_at"
    fields = ("key", "result", "job", "created_at", "id")

    def get_queryset(self, request: HttpRequest) -> QuerySet[ModelStatistics]:
        """Without the results, which may be long; their own page has them."""
        return super().get_queryset(request).annotate(done=Q(result__isnull=False)).defer("result")

    @admin.display(description="counted", boolean=True)
    def counted(self, row: ModelStatistics) -> bool:
        return bool(row.done)  # type: ignore[attr-defined]


class MeasuredBy(admin.SimpleListFilter):
    """The server's own values (means), or those of participants."""

    title = "measured by"
    parameter_name = "by"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return [("server", "the server"), ("people", "participants")]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Metric]) -> QuerySet[Metric]:
        if self.value() in {"server", "people"}:
            return queryset.filter(reporter__isnull=self.value() == "server")
        return queryset


@admin.register(Metric)
class MetricAdmin(HistoryAdmin[Metric]):
    """Binary values stay in the database; only their length is asked for."""

    list_display = ("key", "value", "step", "model_name", "reporter", "identifier", "created_at")
    list_filter = (MeasuredBy, "created_at")
    list_select_related = ("model", "reporter")
    search_fields = ("key", "model__name", "reporter__username", "=model__id")
    ordering = ("-id",)
    date_hierarchy = "created_at"
    fields = (
        "model",
        "local_model",
        "key",
        "value",
        "step",
        "sample_size",
        "reporter",
        "identifier",
        "created_at",
    )

    def get_queryset(self, request: HttpRequest) -> QuerySet[Metric]:
        return (
            super()
            .get_queryset(request)
            .defer("value_binary")
            .annotate(_bytes=Length("value_binary"))
        )

    @admin.display(ordering="value_float")
    def value(self, metric: Metric) -> str:
        if metric.value_float is not None:
            return f"{metric.value_float:.6g}"
        return f"{getattr(metric, '_bytes', 0):,} bytes"

    @admin.display(description="model", ordering="model__name")
    def model_name(self, metric: Metric) -> str:
        return metric.model.name


@admin.register(TrainerEvent)
class TrainerEventAdmin(HistoryAdmin[TrainerEvent]):
    list_display = (
        "type",
        "model_name",
        "round_number",
        "state",
        "attempt",
        "lease_until",
        "created_at",
        "finished_at",
    )
    list_filter = ("state", "created_at")
    list_select_related = ("training__model", "round")
    search_fields = ("type", "training__model__name", "=training__id", "error")
    ordering = ("-id",)
    date_hierarchy = "created_at"
    fields = (
        "training",
        "round",
        "type",
        "state",
        "attempt",
        "lease_until",
        "error",
        "created_at",
        "finished_at",
    )

    @admin.display(description="training", ordering="training__model__name")
    def model_name(self, event: TrainerEvent) -> str:
        return event.training.model.name

    @admin.display(description="round", ordering="round__number")
    def round_number(self, event: TrainerEvent) -> int:
        return event.round.number


@admin.register(WorkSlice)
class WorkSliceAdmin(HistoryAdmin[WorkSlice]):
    list_display = (
        "kind",
        "number",
        "model_name",
        "state",
        "attempt",
        "lease_until",
        "created_at",
        "finished_at",
    )
    list_filter = ("state", "kind", "created_at")
    list_select_related = ("event__training__model",)
    search_fields = ("event__training__model__name", "=event__training__id", "error")
    ordering = ("-id",)
    date_hierarchy = "created_at"
    fields = (
        "event",
        "kind",
        "number",
        "state",
        "attempt",
        "lease_until",
        "error",
        "result",
        "warnings",
        "created_at",
        "finished_at",
    )

    @admin.display(description="slice", ordering="index")
    def number(self, one: WorkSlice) -> str:
        return f"{one.index + 1} of {one.of}"

    @admin.display(description="training", ordering="event__training__model__name")
    def model_name(self, one: WorkSlice) -> str:
        return one.event.training.model.name


@admin.register(Notification)
class NotificationAdmin(HistoryAdmin[Notification]):
    list_display = (
        "type",
        "receiver",
        "model_name",
        "state",
        "attempt",
        "last_status",
        "next_attempt_at",
        "created_at",
    )
    list_filter = ("state", "type", "created_at")
    list_select_related = ("receiver", "training__model")
    search_fields = ("receiver__username", "training__model__name", "=training__id", "last_error")
    ordering = ("-id",)
    date_hierarchy = "created_at"
    fields = (
        "training",
        "receiver",
        "type",
        "task",
        "body",
        "state",
        "attempt",
        "next_attempt_at",
        "last_status",
        "last_error",
        "created_at",
        "finished_at",
        "delivery_id",
    )

    @admin.display(description="training", ordering="training__model__name")
    def model_name(self, message: Notification) -> str:
        return message.training.model.name


@admin.register(IdempotencyKey)
class IdempotencyKeyAdmin(HistoryAdmin[IdempotencyKey]):
    """Without the remembered answers: one of them may hold a token."""

    list_display = ("scope", "key", "user", "status", "created_at")
    list_filter = ("status", "created_at")
    list_select_related = ("user",)
    search_fields = ("scope", "key", "user__username")
    ordering = ("-id",)
    date_hierarchy = "created_at"
    fields = ("scope", "key", "user", "status", "body_digest", "created_at")

    def get_queryset(self, request: HttpRequest) -> QuerySet[IdempotencyKey]:
        return super().get_queryset(request).defer("answer")


@admin.register(Upload)
class UploadAdmin(HistoryAdmin[Upload]):
    """Files that arrive in pieces."""

    list_display = ("id", "owner", "length", "created_at", "finished_at", "used_at", "expires_at")
    list_filter = ("created_at", "finished_at", "used_at")
    list_select_related = ("owner",)
    search_fields = ("id", "owner__username", "sha256")
    ordering = ("-created_at",)
    date_hierarchy = "created_at"
    fields = (
        "id", "owner", "length", "sha256", "metadata", "created_at", "finished_at", "used_at",
        "update", "expires_at",
    )  # fmt: skip
