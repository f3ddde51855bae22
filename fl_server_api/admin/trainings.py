"""Trainings and who takes part: watched here, started here, changed only before the start."""

from typing import Any

from django import forms
from django.contrib import admin
from django.db.models import Count, OuterRef, QuerySet, Subquery
from django.db.models.functions import Coalesce
from django.http import HttpRequest

from fl_server_ai.services.controls import (
    training_cancel,
    training_pause,
    training_resume,
    training_retry,
)
from fl_server_ai.services.training_options import options_validate
from fl_server_ai.services.trainings import training_clients_remove, training_start
from fl_server_api.admin import overview
from fl_server_api.admin.base import DeletedByService, HistoryAdmin, row_link, user_of
from fl_server_api.admin.html import cell
from fl_server_core.exceptions import DomainError, IllegalMove
from fl_server_core.lifecycle import TrainingState
from fl_server_core.models import Participant, Training, User
from fl_server_core.services.blocked import blocked_on
from fl_server_core.services.trainings import training_delete, training_locked

BEFORE_START = ("target_num_updates", "options")


class TrainingForm(forms.ModelForm):  # type: ignore[type-arg]  # can't be subscripted at run time
    """Options are checked exactly as the API checks them."""

    class Meta:
        model = Training
        fields = BEFORE_START

    def clean_options(self) -> dict[str, Any]:
        options = self.cleaned_data["options"] or {}
        if not isinstance(options, dict):
            raise forms.ValidationError("options are a JSON object, such as {}")
        try:
            options_validate(aggregation_method=self.instance.aggregation_method, options=options)
        except DomainError as error:
            raise forms.ValidationError(error.detail) from error
        return options


@admin.register(Training)
class TrainingAdmin(DeletedByService[Training]):
    """Researchers create trainings over the API; here they are watched, started and deleted."""

    form = TrainingForm
    list_display = (
        "model_name",
        "state_text",
        "progress",
        "members",
        "updated",
        "method",
        "actor",
    )
    list_filter = ("state", "created_at", "last_update")
    list_select_related = ("model", "actor")
    search_fields = ("model__name", "actor__username", "aggregation_method", "=id", "=model__id")
    date_hierarchy = "created_at"
    actions = ("start", "pause", "resume", "cancel", "retry")
    fieldsets = (
        (
            None,
            {"fields": ("state_text", "waits", "reason", "progress", "model_link", "actor", "see")},
        ),
        ("Who has sent, who is missing", {"fields": ("now", "people")}),
        ("How it goes", {"fields": ("curves", "past")}),
        (
            "What was asked for",
            {
                "fields": (
                    "target_num_updates",
                    "options",
                    "described",
                    "aggregation_method",
                    "uncertainty_method",
                    "metric_names",
                    "base_version",
                    "seed",
                )
            },
        ),
        (
            "Record",
            {
                "fields": (
                    "id",
                    "created_at",
                    "started_at",
                    "finished_at",
                    "last_update",
                    "steered_at",
                    "steered_by",
                )
            },
        ),
    )

    def get_queryset(self, request: HttpRequest) -> QuerySet[Training]:
        # A subquery, not a join: it is counted for the rows of the page only.
        members = (
            Participant.objects.filter(training=OuterRef("pk"), removed_at=None)
            .order_by()
            .values("training")
            .annotate(count=Count("pk"))
            .values("count")
        )
        return super().get_queryset(request).annotate(_members=Coalesce(Subquery(members), 0))

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Training | None = None) -> bool:
        waiting = obj is None or obj.state == TrainingState.INITIAL
        return waiting and super().has_change_permission(request, obj)

    def get_readonly_fields(self, request: HttpRequest, obj: Training | None = None) -> Any:
        fields = [name for _, group in self.fieldsets for name in group["fields"]]
        return [name for name in fields if name not in BEFORE_START]

    def render_change_form(
        self, request: HttpRequest, context: Any, *args: Any, **more: Any
    ) -> Any:
        context["subtitle"] = context["original"].model.name
        return super().render_change_form(request, context, *args, **more)

    def save_model(self, request: HttpRequest, obj: Training, form: Any, change: bool) -> None:
        if not form.changed_data:
            return
        state = training_locked(obj.pk).state
        if state != TrainingState.INITIAL:
            raise IllegalMove(
                f"training {obj.pk} has been started in the meantime; nothing was changed",
                state=state,
            )
        obj.save(update_fields=[*BEFORE_START, "last_update"])

    def service_delete(self, row: Training, user: User) -> None:
        training_delete(training=row, user=user)

    @admin.action(description="Start the selected trainings", permissions=["change"])
    def start(self, request: HttpRequest, queryset: QuerySet[Training]) -> None:
        user = user_of(request)
        self.each(request, queryset, lambda row: training_start(training=row, user=user), "started")

    @admin.action(description="Pause the selected trainings", permissions=["change"])
    def pause(self, request: HttpRequest, queryset: QuerySet[Training]) -> None:
        user = user_of(request)
        self.each(request, queryset, lambda row: training_pause(training=row, user=user), "paused")

    @admin.action(description="Resume the selected trainings", permissions=["change"])
    def resume(self, request: HttpRequest, queryset: QuerySet[Training]) -> None:
        user = user_of(request)
        self.each(
            request, queryset, lambda row: training_resume(training=row, user=user), "resumed"
        )

    @admin.action(description="Cancel the selected trainings for good", permissions=["change"])
    def cancel(self, request: HttpRequest, queryset: QuerySet[Training]) -> None:
        user = user_of(request)
        self.each(
            request, queryset, lambda row: training_cancel(training=row, user=user), "cancelled"
        )

    @admin.action(description="Retry the selected trainings that failed", permissions=["change"])
    def retry(self, request: HttpRequest, queryset: QuerySet[Training]) -> None:
        user = user_of(request)
        self.each(request, queryset, lambda row: training_retry(training=row, user=user), "retried")

    @admin.display(description="model", ordering="model__name")
    def model_name(self, training: Training) -> str:
        return training.model.name

    @admin.display(description="model")
    def model_link(self, training: Training) -> Any:
        return row_link(training.model)

    @admin.display(description="state", ordering="state")
    def state_text(self, training: Training) -> str:
        return training.get_state_display()

    @admin.display(description="last update", ordering="last_update")
    def updated(self, training: Training) -> object:
        return cell(training.last_update)

    @admin.display(description="method", ordering="aggregation_method")
    def method(self, training: Training) -> str:
        return training.aggregation_method

    @admin.display(description="rounds", ordering="model__round")
    def progress(self, training: Training) -> str:
        return f"{training.model.round} of {training.target_num_updates}"

    @admin.display(description="clients", ordering="_members")
    def members(self, training: Training) -> int:
        return int(getattr(training, "_members", 0))

    @admin.display(description="waits for")
    def waits(self, training: Training) -> str:
        found = blocked_on(training=training, visible_to=training.actor)
        return found.text if found else "-"

    @admin.display(description="see also")
    def see(self, training: Training) -> Any:
        return overview.links(training)

    @admin.display(description="current round")
    def now(self, training: Training) -> Any:
        return overview.current(training)

    @admin.display(description="participants")
    def people(self, training: Training) -> Any:
        return overview.participants(training)

    @admin.display(description="mean over the testers")
    def curves(self, training: Training) -> Any:
        return overview.curves(training)

    @admin.display(description="options of the method")
    def described(self, training: Training) -> Any:
        return overview.method_options(training)

    @admin.display(description="last rounds")
    def past(self, training: Training) -> Any:
        return overview.rounds(training)


@admin.register(Participant)
class ParticipantAdmin(HistoryAdmin[Participant]):
    """Who is in which training. Rows stay; the action takes people out, as the API does."""

    list_display = ("user", "model_name", "training_state", "joined_at", "removed_at")
    list_filter = (
        ("removed_at", admin.EmptyFieldListFilter),
        "training__state",
        "joined_at",
    )
    list_select_related = ("user", "training__model")
    search_fields = ("user__username", "training__model__name", "=training__id", "=user__id")
    ordering = ("-id",)
    date_hierarchy = "joined_at"
    fields = ("training", "user", "joined_at", "removed_at")
    actions = ("remove",)

    def has_steer_permission(self, request: HttpRequest) -> bool:
        """For the action: who may change trainings. The service asks further."""
        return user_of(request).has_perm("fl_server_core.change_training")

    @admin.display(description="training", ordering="training__model__name")
    def model_name(self, member: Participant) -> str:
        return member.training.model.name

    @admin.display(description="state of the training", ordering="training__state")
    def training_state(self, member: Participant) -> str:
        return member.training.get_state_display()

    @admin.action(description="Remove from the training", permissions=["steer"])
    def remove(self, request: HttpRequest, queryset: QuerySet[Participant]) -> None:
        user = user_of(request)
        self.each(
            request,
            queryset.filter(removed_at=None).select_related("training", "user"),
            lambda member: training_clients_remove(
                training=member.training, user=user, clients=[member.user_id]
            ),
            "removed",
        )
