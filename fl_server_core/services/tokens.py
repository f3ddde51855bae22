"""Tokens: one factory, one check. What is stored can't be used to log in."""

import hashlib
import hmac
import secrets
from datetime import timedelta

from django.conf import settings
from django.db.models import Q
from django.utils import timezone

from fl_server_core.exceptions import Conflict, DomainError
from fl_server_core.models import ApiToken, User

KEY_LENGTH = 40  # hexadecimal digits, as existing clients expect


class BadToken(DomainError):
    """Unknown, expired or revoked (401)."""

    code = "BAD_TOKEN"


def keyed_digest(purpose: str, text: str, secret: str | bytes | None = None) -> str:
    """HMAC-SHA256 under a key that is derived from SECRET_KEY for this purpose alone."""
    secret = secret or settings.SECRET_KEY
    raw = secret.encode() if isinstance(secret, str) else secret
    key = hashlib.sha256(b"fl:" + purpose.encode() + b":" + raw).digest()
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()


def token_create(*, user: User, label: str = "", days: int | None = None) -> tuple[ApiToken, str]:
    """Make a token; its key is returned for the only time."""
    key = secrets.token_hex(KEY_LENGTH // 2)
    days = settings.FL_TOKEN_DAYS if days is None else days
    token = ApiToken.objects.create(
        user=user,
        label=label,
        prefix=key[:8],
        digest=keyed_digest("token", key),
        expires_at=timezone.now() + timedelta(days=days) if days else None,
    )
    return token, key


def token_issue(*, user: User, label: str = "", days: int | None = None) -> str:
    """`token_create`, where only the key is wanted."""
    return token_create(user=user, label=label, days=days)[1]


def token_rekey(*, pk: int) -> str:
    """Another key for a token whose key nobody has heard; the former one is unknown from now on.

    `Conflict` (TOKEN_USED) if it has been used, and so was heard, or was revoked.
    """
    key = secrets.token_hex(KEY_LENGTH // 2)
    unheard = ApiToken.objects.filter(pk=pk, last_used_at=None, revoked_at=None)
    if not unheard.update(prefix=key[:8], digest=keyed_digest("token", key)):
        raise Conflict(
            f"token {pk} has been used or revoked since it was made; make another, with a new Idempotency-Key",
            code="TOKEN_USED",
        )
    return key


def token_user(*, key: str) -> User:
    """Whose token this is, or `BadToken`. Its last use is written at most once a minute."""
    digests = [keyed_digest("token", key)] + [
        keyed_digest("token", key, secret) for secret in settings.SECRET_KEY_FALLBACKS
    ]
    token = ApiToken.objects.select_related("user").filter(digest__in=digests).first()
    now = timezone.now()
    if token is None or not token.user.is_active:
        raise BadToken("unknown token; log in again or ask the admin for a new one")
    if token.revoked_at:
        raise BadToken("this token was revoked; ask the admin for a new one", code="TOKEN_REVOKED")
    if token.expires_at and token.expires_at <= now:
        raise BadToken(
            f"this token expired at {token.expires_at:%Y-%m-%d %H:%M} UTC; "
            "make a new one with POST /api/users/myself/tokens/ and your password",
            code="TOKEN_EXPIRED",
        )
    minute_ago = now - timedelta(minutes=1)
    if token.last_used_at is None or token.last_used_at < minute_ago:
        ApiToken.objects.filter(
            Q(last_used_at=None) | Q(last_used_at__lt=minute_ago), pk=token.pk
        ).update(last_used_at=now)
    return token.user


def token_revoke(*, token: ApiToken) -> None:
    """Stop a token from working, at once. Revoking it again keeps the first time."""
    ApiToken.objects.filter(pk=token.pk, revoked_at=None).update(revoked_at=timezone.now())


def webhook_secret(*, user: User) -> str:
    """What messages to this user are signed with; derived, so nothing is stored and it is repeatable."""
    return keyed_digest("webhook", str(user.pk))
