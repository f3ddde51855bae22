"""Who is asking: a token (in its own header or as a Basic user name), a password, or a session."""

import base64
import binascii
import re
from datetime import timedelta
from typing import Any

from django.contrib.auth import authenticate
from django.db.models import Q
from django.utils import timezone
from drf_spectacular.authentication import SessionScheme as SpectacularSessionScheme
from drf_spectacular.extensions import OpenApiAuthenticationExtension
from rest_framework import authentication
from rest_framework.authentication import BaseAuthentication, get_authorization_header
from rest_framework.exceptions import AuthenticationFailed, PermissionDenied
from rest_framework.request import Request

from fl_server_api.guessing import Guesses
from fl_server_api.throttling import PASSWORDS
from fl_server_core.models import User
from fl_server_core.services.tokens import BadToken, token_user

SEEN = timedelta(seconds=30)
TOKEN = re.compile(r"[0-9a-f]{40}")


def caller(request: Request) -> User:
    """The authenticated user of a request that needs one."""
    user = request.user
    if not isinstance(user, User):
        raise AuthenticationFailed("log in first", code="NOT_AUTHENTICATED")
    return user


def seen(user: User) -> User:
    """Note, at most once in 30 s, that this user was here."""
    now = timezone.now()
    if user.last_seen_at is None or user.last_seen_at < now - SEEN:
        stale = Q(last_seen_at=None) | Q(last_seen_at__lt=now - SEEN)
        User.objects.filter(stale, pk=user.pk).update(last_seen_at=now)
        user.last_seen_at = now
    return user


def _by_token(key: str) -> User:
    try:
        return seen(token_user(key=key))
    except BadToken as error:
        raise AuthenticationFailed(error.detail, code=error.error_code) from error


def _credentials(request: Request, scheme: bytes) -> bytes | None:
    parts = get_authorization_header(request).split()
    if not parts or parts[0].lower() != scheme:
        return None
    if len(parts) != 2 or len(parts[1]) > 4096:
        raise AuthenticationFailed("this Authorization header has no valid form", code="BAD_TOKEN")
    return parts[1]


class TokenAuthentication(BaseAuthentication):
    """`Authorization: Token <key>`."""

    def authenticate(self, request: Request) -> tuple[User, str] | None:
        if get_authorization_header(request).lower().startswith(b"bearer"):
            raise AuthenticationFailed("use 'Authorization: Token <key>', not Bearer", "BAD_TOKEN")
        key = _credentials(request, b"token")
        return None if key is None else (_by_token(key.decode("latin-1")), "token")

    def authenticate_header(self, request: Request) -> str:
        return "Token"


class BasicAuthentication(BaseAuthentication):
    """`user:password`, or a token as the user name with no password."""

    def authenticate(self, request: Request) -> tuple[User, str] | None:
        encoded = _credentials(request, b"basic")
        if encoded is None:
            return None
        try:
            name, _, password = base64.b64decode(encoded, validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError) as error:
            raise AuthenticationFailed(
                "no valid Basic credentials", code="BAD_CREDENTIALS"
            ) from error
        if not password and TOKEN.fullmatch(name):
            return _by_token(name), "token"
        PASSWORDS.count(request)
        guesses = Guesses(request._request, name)
        guesses.check()
        user = None
        if "\x00" not in name:
            user = authenticate(request=request._request, username=name, password=password)
        if not isinstance(user, User):
            guesses.count()
            raise AuthenticationFailed("wrong user name or password", code="BAD_CREDENTIALS")
        guesses.forget()
        return seen(user), "password"

    def authenticate_header(self, request: Request) -> str:
        return 'Basic realm="fl-server"'


class SessionAuthentication(authentication.SessionAuthentication):
    """The admin's session. The CSRF token is read from its header only.

    A field of a form would do for Django too, but to look for it is to read the whole body, before
    anybody has asked whether it may be sent.
    """

    def enforce_csrf(self, request: Request) -> None:
        django = request._request
        method = django.method
        try:
            if method == "POST":
                django.method = "PUT"  # checked alike, but Django looks for a field in a POST alone
            super().enforce_csrf(request)
        except PermissionDenied as error:
            said = (
                f"{error.detail} Send the cookie's value in the header X-CSRFToken, or use a token."
            )
            raise PermissionDenied(said, code="CSRF") from error
        finally:
            django.method = method


class SessionScheme(SpectacularSessionScheme):  # type: ignore[no-untyped-call]
    """How the OpenAPI document describes the session."""

    target_class = "fl_server_api.auth.SessionAuthentication"


class TokenScheme(OpenApiAuthenticationExtension):  # type: ignore[no-untyped-call]
    """How the OpenAPI document describes tokens."""

    target_class = "fl_server_api.auth.TokenAuthentication"
    name = "token"

    def get_security_definition(self, auto_schema: Any) -> dict[str, Any]:
        about = "`Token <key>`; the key comes with registration"
        return {"type": "apiKey", "in": "header", "name": "Authorization", "description": about}


class BasicScheme(OpenApiAuthenticationExtension):  # type: ignore[no-untyped-call]
    """How the OpenAPI document describes passwords."""

    target_class = "fl_server_api.auth.BasicAuthentication"
    name = "basic"

    def get_security_definition(self, auto_schema: Any) -> dict[str, Any]:
        return {"type": "http", "scheme": "basic"}
