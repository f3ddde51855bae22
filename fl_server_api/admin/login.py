"""The admin's login: wrong passwords are counted as at the API, and stopped as early."""

import functools
import math
from typing import Any

from django.contrib import admin
from django.contrib.admin.forms import AdminAuthenticationForm
from django.core.exceptions import ValidationError
from django.http import HttpRequest, HttpResponse
from rest_framework.exceptions import Throttled

from fl_server_api.guessing import Guesses
from fl_server_api.throttling import PASSWORDS


class LoginForm(AdminAuthenticationForm):
    """After too many wrong passwords nothing is hashed any more, the right one included, for some minutes."""

    request: HttpRequest
    wait = 0.0  # seconds until passwords are looked at again

    def clean(self) -> dict[str, Any]:
        guesses = Guesses(self.request, str(self.cleaned_data.get("username", "")))
        try:
            PASSWORDS.count(self.request)
            guesses.check()
        except Throttled as error:
            self.wait = error.wait or 1.0  # type: ignore[attr-defined]
            raise ValidationError(
                "Too many wrong passwords; try again in some minutes.",
                code="throttled",
            ) from error
        try:
            cleaned = super().clean()
        except ValidationError:
            guesses.count()
            raise
        guesses.forget()
        return cleaned


@functools.wraps(admin.site.login)
def login(request: HttpRequest, extra_context: dict[str, Any] | None = None) -> HttpResponse:
    """Django's page; with 429 and `Retry-After` for whoever has to wait."""
    answer = admin.AdminSite.login(admin.site, request, extra_context)
    form = (getattr(answer, "context_data", None) or {}).get("form")
    if isinstance(form, LoginForm) and form.wait:
        answer.status_code = 429
        answer.headers["Retry-After"] = str(math.ceil(form.wait))
    return answer
