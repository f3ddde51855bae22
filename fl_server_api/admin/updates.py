"""Updates: to read; those in quarantine are released or refused here, once that is confirmed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from django.contrib import admin
from django.contrib.admin import helpers
from django.core.exceptions import PermissionDenied
from django.db.models import QuerySet
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseRedirect
from django.template.response import TemplateResponse
from django.urls import URLPattern, path, reverse
from django.utils.text import Truncator

from fl_server_ai.services.quarantine import update_refuse, update_release
from fl_server_api.admin.base import HistoryAdmin, bytes_text, user_of
from fl_server_core.lifecycle import UpdateState
from fl_server_core.models import LocalModel

CONFIRMED = "confirmed"


@dataclass(frozen=True)
class Decision:
    """What may be done with an update in quarantine, in words."""

    name: str
    act: Callable[..., LocalModel]
    title: str
    means: str
    done: str


DECISIONS = {
    decision.name: decision
    for decision in (
        Decision(
            "release",
            update_release,
            "Release from quarantine",
            "It counts like any other update of its round. This can't be undone once the round is aggregated.",
            "released",
        ),
        Decision(
            "refuse",
            update_refuse,
            "Refuse for good",
            "It never counts, and its files are deleted. Its owner has failed in the round, or is asked again, as the "
            "training's options say. This can't be undone.",
            "refused",
        ),
    )
}


@admin.register(LocalModel)
class LocalModelAdmin(HistoryAdmin[LocalModel]):
    """What sites sent, and what became of it."""

    change_form_template = "fl_server_api/update.html"
    list_display = (
        "owner",
        "model_name",
        "round_number",
        "sample_size",
        "readable_size",
        "state",
        "why",
        "created_at",
    )
    list_filter = ("state", "created_at")
    list_select_related = ("owner", "round__training__model", "training__model")
    search_fields = ("owner__username", "training__model__name", "=training__id", "=id", "digest")
    ordering = ("-created_at",)
    date_hierarchy = "created_at"
    fields = (
        "state",
        "reason",
        "training",
        "round",
        "owner",
        "trained_in",
        "staleness",
        "sample_size",
        "digest",
        "readable_size",
        "blob",
        "num_steps",
        "base_version",
        "numbers",
        "extras",
        "tensors",
        "mask",
        "created_at",
        "id",
    )
    actions = ("release", "refuse")

    def get_urls(self) -> list[URLPattern]:
        own = [
            path(
                f"<uuid:pk>/{name}/",
                self.admin_site.admin_view(self.decide_view),
                {"name": name},
                name=f"{self.opts.app_label}_{self.opts.model_name}_{name}",
            )
            for name in DECISIONS
        ]
        return [*own, *super().get_urls()]

    def has_steer_permission(self, request: HttpRequest) -> bool:
        """Who may change trainings. The service asks further."""
        return user_of(request).has_perm("fl_server_core.change_training")

    def render_change_form(
        self, request: HttpRequest, context: Any, *args: Any, **more: Any
    ) -> Any:
        update = context["original"]
        waits = update.state == UpdateState.QUARANTINED and self.has_steer_permission(request)
        context["decisions"] = list(DECISIONS.values()) if waits else []
        return super().render_change_form(request, context, *args, **more)

    def decide_view(self, request: HttpRequest, pk: object, name: str) -> HttpResponse:
        """One update: asks first, then does it."""
        update = self.get_object(request, str(pk))
        if update is None:
            raise Http404
        if not self.has_view_permission(request, update) or not self.has_steer_permission(request):
            raise PermissionDenied
        if request.method != "POST":
            return self._ask(request, [update], DECISIONS[name])
        self._do(request, [update], DECISIONS[name])
        return HttpResponseRedirect(
            reverse(f"admin:{self.opts.app_label}_{self.opts.model_name}_change", args=[update.pk])
        )

    @admin.action(description="Release from quarantine", permissions=["steer"])
    def release(
        self, request: HttpRequest, queryset: QuerySet[LocalModel]
    ) -> TemplateResponse | None:
        return self._each(request, queryset, DECISIONS["release"])

    @admin.action(description="Refuse those in quarantine for good", permissions=["steer"])
    def refuse(
        self, request: HttpRequest, queryset: QuerySet[LocalModel]
    ) -> TemplateResponse | None:
        return self._each(request, queryset, DECISIONS["refuse"])

    def _each(
        self, request: HttpRequest, chosen: QuerySet[LocalModel], decision: Decision
    ) -> TemplateResponse | None:
        updates = list(chosen.select_related("round", "owner", "training__model"))
        if CONFIRMED not in request.POST:
            return self._ask(request, updates, decision)
        self._do(request, updates, decision)
        return None

    def _ask(
        self, request: HttpRequest, updates: list[LocalModel], decision: Decision
    ) -> TemplateResponse:
        context = {
            **self.admin_site.each_context(request),
            "opts": self.opts,
            "title": decision.title,
            "decision": decision,
            "updates": updates,
            "several": request.method == "POST",
            "checkbox": helpers.ACTION_CHECKBOX_NAME,
            "confirmed": CONFIRMED,
        }
        return TemplateResponse(request, "fl_server_api/decide_update.html", context)

    def _do(self, request: HttpRequest, updates: list[LocalModel], decision: Decision) -> None:
        user = user_of(request)
        self.each(
            request, updates, lambda update: decision.act(update=update, user=user), decision.done
        )

    @admin.display(description="training", ordering="training__model__name")
    def model_name(self, update: LocalModel) -> str:
        return update.training.model.name

    @admin.display(description="reason", ordering="reason")
    def why(self, update: LocalModel) -> str:
        return Truncator(update.reason).chars(100) or "-"

    @admin.display(description="round", ordering="round__number")
    def round_number(self, update: LocalModel) -> int:
        return update.round.number

    @admin.display(description="size", ordering="size")
    def readable_size(self, update: LocalModel) -> str:
        return bytes_text(update.size)
