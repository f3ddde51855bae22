"""Users, and the tokens that they authenticate with. No key or digest is ever shown again."""

from typing import Any

from django.contrib import admin, messages
from django.contrib.auth.admin import UserAdmin
from django.db import models
from django.db.models import QuerySet
from django.http import HttpRequest
from django.utils import timezone

from fl_server_api.admin.base import ServiceAdmin, list_link, user_of
from fl_server_core.models import ApiToken, User
from fl_server_core.services.tokens import token_issue, token_revoke

ROLES = ("actor", "client", "message_endpoint")
POWERS = ("is_staff", "is_superuser", "groups", "user_permissions")


@admin.register(User)
class PeopleAdmin(UserAdmin):  # type: ignore[type-arg]  # Django's class can't be subscripted
    """Django's page for users with our fields. Only superusers hand out power, or touch superusers."""

    list_display = ("username", "email", "actor", "client", "is_active", "last_seen_at")
    list_filter = ("actor", "client", "is_active", "is_staff", "is_superuser")
    search_fields = ("username", "email", "first_name", "last_name", "=id")
    ordering = ("username",)
    date_hierarchy = "date_joined"
    readonly_fields = ("id", "last_seen_at", "last_login", "date_joined", "rows")
    show_full_result_count = False
    list_per_page = 50
    actions = ("issue_token",)
    delete_confirmation_template = "fl_server_api/delete_user.html"
    delete_selected_confirmation_template = "fl_server_api/delete_users.html"
    formfield_overrides = {models.URLField: {"assume_scheme": "https"}}
    fieldsets = (
        (None, {"fields": ("username", "password")}),
        ("Part in trainings", {"fields": (*ROLES, "storage_bytes", "rows")}),
        ("Person", {"fields": ("first_name", "last_name", "email")}),
        ("Access", {"fields": ("is_active", *POWERS)}),
        ("Record", {"fields": ("id", "last_seen_at", "last_login", "date_joined")}),
    )
    add_fieldsets = (*UserAdmin.add_fieldsets, ("Part in trainings", {"fields": ROLES}))

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> Any:
        fields = super().get_readonly_fields(request, obj)
        return fields if user_of(request).is_superuser else (*fields, *POWERS)

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return self._may_touch(request, obj) and super().has_change_permission(request, obj)

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return self._may_touch(request, obj) and super().has_delete_permission(request, obj)

    def get_deleted_objects(self, objs: Any, request: HttpRequest) -> Any:
        """Without naming every row of a long history: it protects the account anyway."""
        kept = {user: kinds for user in objs if (kinds := _history(user))}
        if kept:
            said = [f"{user}: {', '.join(kinds)}" for user, kinds in kept.items()]
            return [str(user) for user in objs], {}, set(), said
        return super().get_deleted_objects(objs, request)

    def has_issue_permission(self, request: HttpRequest) -> bool:
        """For the action: who may add tokens."""
        return user_of(request).has_perm("fl_server_core.add_apitoken")

    @staticmethod
    def _may_touch(request: HttpRequest, user: User | None) -> bool:
        return user is None or not user.is_superuser or user_of(request).is_superuser

    @admin.display(description="see")
    def rows(self, user: User) -> Any:
        return list_link(ApiToken, "tokens", user__id__exact=user.pk)

    @admin.action(description="Issue a token (shown once)", permissions=["issue"])
    def issue_token(self, request: HttpRequest, queryset: QuerySet[User]) -> None:
        for user in queryset[:20]:
            if not user.is_active or not self._may_touch(request, user):
                self.message_user(
                    request, f"{user}: you may not issue a token for this user", messages.ERROR
                )
                continue
            key = token_issue(user=user, label=f"issued by {user_of(request)}"[:100])
            self.log_change(request, user, "issued a token")
            self.message_user(
                request,
                f"Token of {user}: {key} - copy it now, it is not shown again.",
                messages.WARNING,
            )


def _history(user: User) -> list[str]:
    """The kinds of rows that refer to this user for good."""
    return [
        str(relation.related_model._meta.verbose_name_plural)
        for relation in User._meta.related_objects
        if relation.on_delete is models.PROTECT
        and relation.related_model._base_manager.filter(**{relation.field.name: user}).exists()
    ]


@admin.register(ApiToken)
class ApiTokenAdmin(ServiceAdmin[ApiToken]):
    """Issued from the list of users; here they are labelled, and stopped."""

    list_display = ("prefix", "user", "label", "standing", "created_at", "last_used_at")
    list_filter = (
        ("revoked_at", admin.EmptyFieldListFilter),
        "expires_at",
        "last_used_at",
    )
    list_select_related = ("user",)
    search_fields = ("prefix", "label", "user__username")
    ordering = ("-id",)
    date_hierarchy = "created_at"
    fields = (
        "user",
        "prefix",
        "label",
        "expires_at",
        "standing",
        "created_at",
        "last_used_at",
        "revoked_at",
    )
    readonly_fields = ("user", "prefix", "standing", "created_at", "last_used_at", "revoked_at")
    actions = ("revoke",)

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    @admin.display(description="state")
    def standing(self, token: ApiToken) -> str:
        if token.revoked_at:
            return "revoked"
        if token.expires_at and token.expires_at <= timezone.now():
            return "expired"
        return "valid" if token.user.is_active else "its user is inactive"

    @admin.action(description="Revoke the selected tokens", permissions=["change"])
    def revoke(self, request: HttpRequest, queryset: QuerySet[ApiToken]) -> None:
        self.each(request, queryset, lambda token: token_revoke(token=token), "revoked")
