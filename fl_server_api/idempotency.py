"""`Idempotency-Key`: the same request again gets the same answer, and nothing is created twice."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from django.conf import settings
from django.db import IntegrityError, transaction
from rest_framework.request import Request
from rest_framework.response import Response

from fl_server_api.uploads import StagedFile
from fl_server_core.exceptions import Conflict, Invalid
from fl_server_core.models import IdempotencyKey, User
from fl_server_core.services.tokens import keyed_digest

MAX_KEY = 200


def create_once(
    request: Request, act: Callable[[], Mapping[str, Any]], *, secret: frozenset[str] = frozenset()
) -> Response:
    """Answer 201 with what `act` creates; again, with the same key, what it created then.

    Fields in `secret` are given once and not remembered.
    """
    return Response(once(request, act, secret=secret), status=201)


def once(
    request: Request,
    act: Callable[[], Mapping[str, Any]],
    *,
    secret: frozenset[str] = frozenset(),
    asked: Mapping[str, Any] | None = None,
) -> Mapping[str, Any]:
    """What `act` says, or said when the request came first: with a key, it and its memory commit together.

    The same key with another body is a `Conflict`; `asked` is what counts where that is not in the body.
    """
    named = _named(request)
    if named is None:
        return act()
    user, scope, key = named
    digest, *former = _digests(request.data if asked is None else asked)
    with transaction.atomic():
        try:
            with transaction.atomic():
                row = IdempotencyKey.objects.create(
                    user=user, scope=scope, key=key, body_digest=digest, status=201, answer={}
                )
        except IntegrityError:
            return _again(IdempotencyKey.objects.get(scope=scope, key=key), {digest, *former})
        answer = dict(act())
        row.answer = json.loads(
            json.dumps({k: v for k, v in answer.items() if k not in secret}, default=str)
        )
        row.save(update_fields=["answer"])
    return answer


def known(request: Request) -> bool:
    """Whether something is remembered of the request's key; its body is not read for that."""
    named = _named(request)
    return named is not None and (
        IdempotencyKey.objects.filter(scope=named[1], key=named[2]).exists()
    )


def answered_before(request: Request) -> Response | None:
    """What `create_once` remembers of this key: where what the body names is used up by being asked."""
    named = _named(request)
    if named is None:
        return None
    row = IdempotencyKey.objects.filter(scope=named[1], key=named[2]).first()
    if row is None:
        return None
    return Response(_again(row, set(_digests(request.data))), status=row.status)


def _named(request: Request) -> tuple[User | None, str, str] | None:
    """Caller, scope and key; None without a key."""
    key = request.headers.get("Idempotency-Key", "")
    if not key:
        return None
    if len(key) > MAX_KEY or not key.isprintable():
        raise Invalid(
            f"an Idempotency-Key has at most {MAX_KEY} visible characters", code="BAD_KEY"
        )
    user = request.user if isinstance(request.user, User) else None
    path = request.path.replace("/api/v1/", "/api/", 1)
    return user, f"{request.method} {path} {user.pk if user else '-'}"[:200], key


def _again(row: IdempotencyKey, digests: set[str]) -> Mapping[str, Any]:
    if row.body_digest not in digests:
        raise Conflict(
            "this Idempotency-Key was used with another body; use a new one",
            code="IDEMPOTENCY_MISMATCH",
        )
    answer: dict[str, Any] = row.answer
    return answer


def _digests(data: Any) -> list[str]:
    """Of what was asked, under today's secret and former ones: without it nobody can guess at a password."""
    fields = dict(data.lists()) if hasattr(data, "lists") else data
    text = json.dumps(
        fields, sort_keys=True, default=lambda v: v.sha256 if isinstance(v, StagedFile) else str(v)
    )
    secrets = (settings.SECRET_KEY, *settings.SECRET_KEY_FALLBACKS)
    return [keyed_digest("idempotency", text, secret) for secret in secrets]
