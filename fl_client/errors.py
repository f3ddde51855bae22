"""What can go wrong, as types to catch: every one is an `FLError` and ends with a next step."""

from collections.abc import Mapping, Sequence
from typing import Any


class FLError(Exception):
    """A refusal or a failure. `status` is the HTTP status, 0 where no answer came.

    `code` is stable and meant for programs; `errors` lists `{pointer, code, detail}` where single
    fields were refused; `request_id` finds the request in the server's log.
    """

    next_step = ""
    retry_after: float | None = None  # seconds, where the server named them

    def __init__(
        self,
        status: int,
        code: str,
        detail: str,
        request_id: str | None = None,
        errors: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self.status = status
        self.code = code
        self.detail = detail
        self.request_id = request_id
        self.errors = [dict(error) for error in errors]
        super().__init__(self._message())

    def _message(self) -> str:
        parts = [self.detail.rstrip() or self.code or f"HTTP {self.status}"]
        fields = [f"{e.get('pointer', '?')}: {e.get('detail', '')}" for e in self.errors]
        parts += [field for field in fields if field not in self.detail]
        if self.code:
            parts[0] += f" [{self.code}]"
        if self.request_id:
            parts.append(f"(request {self.request_id})")
        step = NEXT_STEPS.get(self.code, self.next_step)
        if step:
            parts.append(f"Next step: {step}")
        return "\n".join(parts)


class AuthenticationFailed(FLError):
    next_step = "check the token; it may have expired or been revoked. Ask an admin for a new one."


class NotPermitted(FLError):
    next_step = "ask the owner of the object, or connect with the account that may do this."


class NotFound(FLError):
    next_step = "check the id; objects of others that you may not see answer the same."


class Conflict(FLError):
    """Wrong state, wrong round or a duplicate; `detail` says what stands against it."""


class TooLarge(FLError):
    next_step = "send less, or ask the server's admin to raise the limit."


class Unusable(FLError):
    """It was understood, and can't be used as it is; `detail` says why."""


class Throttled(FLError):
    next_step = "wait as long as Retry-After said, then ask less often."


class ServerError(FLError):
    next_step = "try again later; give the server's admin the request id if it stays."


class ConnectionFailed(FLError):
    """No (complete) answer; whether the server has seen the request is unknown."""

    next_step = "check the address, that the server runs, and the proxy or CA settings."


class BrokenFile(FLError):
    """Bytes that are not what their digest or their header promises."""

    next_step = "transfer the file again; if it stays, something between here and there alters it."


class TrainingFailed(FLError):
    """The training has ended in state `E`; `detail` is the server's reason."""

    next_step = "read the reason, mend the cause, then retry the training or create a new one."


class Stopped(Exception):
    """Raised by `context.progress` when the server no longer wants this task. Let it pass through."""


NEXT_STEPS = {
    "FOREIGN_ORIGIN": "connect to the address that the server itself uses in its answers.",
    "REDIRECTED": "connect to the address that the server redirects to.",
    "ROUND_CLOSED": "nothing to do; the next round brings a new task.",
    "CA_FILE": "give ca= the path of a PEM file that is there; the server's admin has it.",
    "NOT_TLS": "use http:// for this address, or the port at which the server speaks HTTPS.",
    "NEEDS_TLS": "use https:// for this address.",
    "NOT_A_CLIENT": "ask the server's admin to register this account as a client.",
    "CERTIFICATE": "give the server's own CA file as ca=, fetched over a way that you trust.",
    **dict.fromkeys(
        ("KEY_MISMATCH", "SHAPE_MISMATCH", "DTYPE_MISMATCH"),
        "compare names, shapes and dtypes with the model that was handed out.",
    ),
    "NON_FINITE": "lower the learning rate or clip gradients; the update contains NaN or Inf.",
}

# Trouble on the way that waiting does not mend.
NEVER_HEALS = frozenset({"CERTIFICATE", "NOT_TLS", "NEEDS_TLS"})
_BY_STATUS: dict[int, type[FLError]] = {
    401: AuthenticationFailed,
    403: NotPermitted,
    404: NotFound,
    409: Conflict,
    413: TooLarge,
    422: Unusable,
    429: Throttled,
}


def is_settled(error: FLError) -> bool:
    """Whether the server has decided, so that asking the same again cannot help."""
    unsettled = (AuthenticationFailed, ConnectionFailed, ServerError, Throttled)
    return not isinstance(error, unsettled) and error.status != 408


def error_for(status: int, body: object, request_id: str | None) -> FLError:
    """The typed error of an answer; `body` is its parsed JSON, or anything else if it was none."""
    fields = body if isinstance(body, dict) else {}
    kind = _BY_STATUS.get(status, ServerError if status >= 500 else FLError)
    errors = fields.get("errors")
    return kind(
        status,
        str(fields.get("code") or ""),
        str(fields.get("detail") or f"the server answered {status}"),
        request_id or fields.get("request_id"),
        [e for e in errors if isinstance(e, dict)] if isinstance(errors, list) else (),
    )
