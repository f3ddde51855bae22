"""What all admin pages share: history is read-only, a service's refusal is a message, rows link to rows."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from django.contrib import admin, messages
from django.db import transaction
from django.db.models import Model, QuerySet
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.template.defaultfilters import filesizeformat
from django.urls import reverse
from django.utils.html import format_html
from django.utils.safestring import SafeString

from fl_server_core.exceptions import DomainError
from fl_server_core.models import User

M = TypeVar("M", bound=Model)

if TYPE_CHECKING:

    class _Base(admin.ModelAdmin[M]): ...

else:  # Django's class can't be subscripted at run time

    class _Base(admin.ModelAdmin, Generic[M]): ...


def user_of(request: HttpRequest) -> User:
    """Whoever is logged in; the admin site lets nobody else in."""
    if not isinstance(request.user, User):
        raise TypeError("the admin site serves logged-in users only")
    return request.user


def row_link(row: Model | None, text: object = None) -> str | SafeString:
    """A link to the row's page, "-" for None. The text is escaped."""
    if row is None:
        return "-"
    name = f"admin:{row._meta.app_label}_{row._meta.model_name}_change"
    return format_html(
        '<a href="{}">{}</a>', reverse(name, args=[row.pk]), str(row) if text is None else text
    )


def list_link(model: type[Model], text: object, **filters: object) -> SafeString:
    """A link to the list of `model`, filtered; the text is escaped."""
    name = f"admin:{model._meta.app_label}_{model._meta.model_name}_changelist"
    url = reverse(name, query={key: str(value) for key, value in filters.items()})
    return format_html('<a href="{}">{}</a>', url, text)


def bytes_text(size: int | None) -> str:
    """A size for people: "1.5 MB"; "-" for None."""
    return "-" if size is None else filesizeformat(size)


class ServiceAdmin(_Base[M]):
    """Changes go through services. One that refuses undoes the whole request and becomes a message."""

    show_full_result_count = False
    list_per_page = 50

    def changelist_view(
        self, request: HttpRequest, extra_context: dict[str, Any] | None = None
    ) -> HttpResponse:
        if request.method != "POST":
            return super().changelist_view(request, extra_context)
        return self._guarded(
            request,
            request.get_full_path(),
            lambda: super(ServiceAdmin, self).changelist_view(request, extra_context),
        )

    def changeform_view(
        self,
        request: HttpRequest,
        object_id: str | None = None,
        form_url: str = "",
        extra_context: dict[str, Any] | None = None,
    ) -> HttpResponse:
        return self._guarded(
            request,
            request.path,
            lambda: super(ServiceAdmin, self).changeform_view(
                request, object_id, form_url, extra_context
            ),
        )

    def delete_view(
        self, request: HttpRequest, object_id: str, extra_context: dict[str, Any] | None = None
    ) -> HttpResponse:
        name = f"admin:{self.opts.app_label}_{self.opts.model_name}_change"
        return self._guarded(
            request,
            reverse(name, args=[object_id]),
            lambda: super(ServiceAdmin, self).delete_view(request, object_id, extra_context),
        )

    def _guarded(
        self, request: HttpRequest, back: str, answer: Callable[[], HttpResponse]
    ) -> HttpResponse:
        try:
            if request.method != "POST":
                return answer()
            with transaction.atomic():
                return answer()
        except DomainError as error:
            self.message_user(request, error.detail, messages.ERROR)
            return HttpResponseRedirect(back)

    def each(
        self, request: HttpRequest, rows: Iterable[M], act: Callable[[M], object], done: str
    ) -> None:
        """Do `act` to every row; each refusal is a message of its own and stops nothing."""
        count = 0
        for row in rows:
            try:
                act(row)
            except DomainError as error:
                self.message_user(request, f"{row}: {error.detail}", messages.ERROR)
            else:
                self.log_change(request, row, done)
                count += 1
        if count:
            self.message_user(request, f"{count} {done}", messages.SUCCESS)


class DeletedByService(ServiceAdmin[M]):
    """Deletion asks a service, which decides; nothing is said about rows below that it takes along."""

    def service_delete(self, row: M, user: User) -> None:
        raise NotImplementedError

    def get_deleted_objects(
        self, objs: Any, request: HttpRequest
    ) -> tuple[list[str], dict[str, int], set[str], list[str]]:
        rows = list(objs)
        return (
            [str(row) for row in rows],
            {str(self.opts.verbose_name_plural): len(rows)},
            set(),
            [],
        )

    def delete_model(self, request: HttpRequest, obj: M) -> None:
        self.service_delete(obj, user_of(request))

    def delete_queryset(self, request: HttpRequest, queryset: QuerySet[M]) -> None:
        for row in queryset:
            self.service_delete(row, user_of(request))


class HistoryAdmin(ServiceAdmin[M]):
    """Rows that nobody may add, change or delete here, superusers included."""

    actions_on_bottom = False

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: M | None = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: M | None = None) -> bool:
        return False
