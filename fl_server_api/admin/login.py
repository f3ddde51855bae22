"""The admin's login: wrong passwords are counted as at the API, and stopped as early."""

from typing import Any

from django.contrib.admin.forms import AdminAuthenticationForm
from django.core.exceptions import ValidationError
from django.http import HttpRequest
from rest_framework.exceptions import Throttled

from fl_server_api.guessing import Guesses
from fl_server_api.throttling import PASSWORDS


class LoginForm(AdminAuthenticationForm):
    """After too many wrong passwords nothing is hashed any more, the right one included, for some minutes."""

    request: HttpRequest

    def clean(self) -> dict[str, Any]:
        guesses = Guesses(self.request, str(self.cleaned_data.get("username", "")))
        try:
            PASSWORDS.count(self.request)
            guesses.check()
        except Throttled as error:
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
