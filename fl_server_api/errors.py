"""The one place that turns refusals into status codes."""

import logging
import math
from typing import Any

from django.conf import settings
from django.core.exceptions import PermissionDenied as DjangoPermissionDenied
from django.core.exceptions import RequestDataTooBig, SuspiciousOperation
from django.db import InterfaceError, OperationalError
from django.http import Http404, HttpRequest, HttpResponse, JsonResponse, UnreadablePostError
from django.urls import Resolver404, resolve
from django.views.csrf import csrf_failure as django_csrf_failure
from django.views.decorators.csrf import csrf_exempt
from rest_framework import exceptions
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import set_rollback

from fl_server_api.draining import drain
from fl_server_core import exceptions as domain
from fl_server_core.connections import database_full
from fl_server_core.storage import out_of_space

log = logging.getLogger("fl.server")
RETRY_SECONDS = 2
STATUS: dict[type[domain.DomainError], int] = {
    domain.Invalid: 400,
    domain.NotPermitted: 403,
    domain.NotFound: 404,
    domain.Conflict: 409,
    domain.TooLarge: 413,
    domain.UnknownContainer: 415,
    domain.Unusable: 422,
    domain.TooManyQuestions: 429,
    domain.ChecksumMismatch: 460,
    domain.Unavailable: 503,
    domain.OutOfSpace: 507,
}
CODES = {
    400: "INVALID",
    401: "NOT_AUTHENTICATED",
    403: "NOT_PERMITTED",
    404: "NOT_FOUND",
    405: "METHOD_NOT_ALLOWED",
    415: "UNSUPPORTED_MEDIA_TYPE",
    429: "THROTTLED",
}


NO_CREDENTIALS = (
    "this needs a token, as the header 'Authorization: Token <key>'; registering shows you the key, or ask the "
    "admin for a new one"
)


class UpgradeRequired(exceptions.APIException):
    """The client speaks a protocol that is no longer served."""

    status_code = 426
    default_code = "UPGRADE_REQUIRED"


def handle(error: Exception, context: dict[str, Any]) -> Response | None:
    """DRF's exception handler: every refusal as `{detail, code, errors?, request_id, ...}`."""
    request: Request | None = context.get("request")
    answer = _answer(error)
    if answer is None:
        return None  # a bug: Django logs it, and `server_error` answers
    status, body, headers = answer
    set_rollback()
    if request is not None:
        body["request_id"] = request._request.META.get("fl.request_id", "")
        if not isinstance(error, UnreadablePostError):
            drain(request._request)
    return Response(body, status=status, headers=headers)


def _answer(error: Exception) -> tuple[int, dict[str, Any], dict[str, str]] | None:
    if database_full(error) or (isinstance(error, OSError) and out_of_space(error)):
        log.warning("no room on the disk: %s", error)
        said = "the server's disk is full; nothing was stored"
        return _domain(domain.OutOfSpace(said))
    if isinstance(error, OperationalError | InterfaceError):
        log.warning("the database is away: %s", error)
        said = "the database can't be asked just now; try again in a moment"
        return _domain(domain.Unavailable(said, code="DATABASE_AWAY", retry_after=RETRY_SECONDS))
    if isinstance(error, domain.DomainError):
        return _domain(error)
    if isinstance(error, UnreadablePostError):  # nobody may be left to read the answer
        said = "the request's body could not be read to its end"
        return 400, {"detail": said, "code": "BODY_INTERRUPTED"}, {}
    if isinstance(error, RequestDataTooBig):
        most = settings.DATA_UPLOAD_MAX_MEMORY_SIZE
        said = f"all but the files of a form may have {most:,} bytes; send what is large as a file"
        return 413, {"detail": said, "code": "TOO_LARGE"}, {}
    if isinstance(error, SuspiciousOperation):
        said = (
            f"a form may have {settings.DATA_UPLOAD_MAX_NUMBER_FIELDS:,} fields and "
            f"{settings.DATA_UPLOAD_MAX_NUMBER_FILES:,} files; send fewer"
        )
        return 400, {"detail": said, "code": "TOO_MANY_FIELDS"}, {}
    if isinstance(error, Http404):
        error = exceptions.NotFound()
    elif isinstance(error, exceptions.NotAuthenticated):
        error.detail = exceptions.ErrorDetail(NO_CREDENTIALS)
    elif isinstance(error, DjangoPermissionDenied):
        error = exceptions.PermissionDenied()
    if isinstance(error, exceptions.ValidationError):
        return 400, _validation(error), {}
    if isinstance(error, exceptions.APIException):
        return _api(error)
    return None


def _domain(error: domain.DomainError) -> tuple[int, dict[str, Any], dict[str, str]]:
    status = next(s for kind, s in STATUS.items() if isinstance(error, kind))
    wait = error.data.get("retry_after")
    headers = {} if wait is None else {"Retry-After": str(wait)}
    return status, {"detail": error.detail, "code": error.error_code, **error.data}, headers


def _api(error: exceptions.APIException) -> tuple[int, dict[str, Any], dict[str, str]]:
    headers = {}
    if getattr(error, "auth_header", None):
        headers["WWW-Authenticate"] = error.auth_header  # type: ignore[attr-defined]
    if getattr(error, "wait", None):
        headers["Retry-After"] = str(max(1, math.ceil(error.wait)))  # type: ignore[attr-defined]
    code = error.get_codes()
    own = isinstance(code, str) and code.isupper()
    body = {
        "detail": str(error.detail),
        "code": code if own else CODES.get(error.status_code, "ERROR"),
    }
    return error.status_code, body, headers


def _validation(error: exceptions.ValidationError) -> dict[str, Any]:
    errors: list[dict[str, str]] = []
    _collect(error.get_full_details(), "", errors)
    said = "; ".join(f"{e['pointer'] or '/'}: {e['detail']}" for e in errors[:3])
    return {"detail": said[:1000], "code": "INVALID", "errors": errors[:100]}


def _collect(details: Any, pointer: str, errors: list[dict[str, str]]) -> None:
    if isinstance(details, dict) and details.keys() == {"message", "code"}:
        errors.append(
            {"pointer": pointer, "code": str(details["code"]), "detail": str(details["message"])}
        )
    elif isinstance(details, dict):
        for key, value in details.items():
            own = "" if key == "non_field_errors" else f"/{key}"
            _collect(value, pointer + own, errors)
    elif isinstance(details, list):
        for value in details:
            _collect(value, pointer, errors)


@csrf_exempt  # or a POST to a mistyped address would be answered with a page about cookies
def not_found(request: HttpRequest, exception: Exception | None = None) -> JsonResponse:
    """For paths that no route has; names the one that was probably meant."""
    drain(request)
    said = "there is nothing at this address"
    path = request.path_info
    for meant in (f"{path}/", f"/api{path}", f"/api{path}/"):
        if _has_route(meant):
            said += f"; did you mean {meant}?"
            break
    else:
        said += "; GET /api/ lists what there is"
    return _plain(request, 404, "NOT_FOUND", said)


def _has_route(path: str) -> bool:
    try:
        return resolve(path).func is not not_found
    except Resolver404:
        return False


def csrf_failure(request: HttpRequest, reason: str = "") -> HttpResponse:
    """For forms without Django's cookie: a page for people, JSON below /api/."""
    if not request.path_info.startswith("/api/"):
        return django_csrf_failure(request, reason)
    drain(request)
    said = "no valid CSRF token; send the cookie's value as X-CSRFToken, or log in with a token"
    return _plain(request, 403, "CSRF", said)


def bad_request(request: HttpRequest, exception: Exception | None = None) -> JsonResponse:
    """For requests that Django itself refuses."""
    return _plain(request, 400, "INVALID", "this request can't be understood")


def invalid_host(request: HttpRequest) -> JsonResponse:
    """For hosts that are not served: one line in the log, which Django's own is not added to."""
    host = request.META.get("HTTP_HOST", "")
    log.warning("refused a request for the host %.100r; FL_ALLOWED_HOSTS lists those served", host)
    drain(request)
    said = (
        f"this server is not known as {host[:100]!r}; use the address that its admin gave you, or have him "
        "add this name to FL_ALLOWED_HOSTS"
    )
    answer = _plain(request, 400, "INVALID_HOST", said)
    answer._has_been_logged = True  # type: ignore[attr-defined]
    return answer


def bad_content_type(request: HttpRequest) -> JsonResponse:
    """For a `Content-Type` that can't be taken apart."""
    drain(request)
    said = "the header Content-Type can't be read; send a type as application/json, with plain parameters"
    return _plain(request, 400, "BAD_HEADER", said)


def server_error(request: HttpRequest) -> JsonResponse:
    """For bugs: says nothing about them but the id to look for in the log."""
    return _plain(request, 500, "SERVER_ERROR", "the server failed; its log knows this request_id")


def _plain(request: HttpRequest, status: int, code: str, detail: str) -> JsonResponse:
    request_id = request.META.get("fl.request_id", "")
    body = {"detail": detail, "code": code, "request_id": request_id}
    return JsonResponse(body, status=status)
