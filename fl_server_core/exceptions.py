"""Everything the domain can refuse, each with a stable code; `fl_server_api.errors` knows the status."""

from typing import Any, ClassVar


class DomainError(Exception):
    """A refusal that the caller can act on.

    `code` is stable and upper case. `data` is JSON that is added to the answer (a state, a tensor name).
    """

    code: ClassVar[str] = "ERROR"

    def __init__(self, detail: str, *, code: str | None = None, **data: Any) -> None:
        super().__init__(detail)
        self.detail = detail
        self.error_code = code or self.code
        self.data = data


class Invalid(DomainError):
    """The request is malformed (400)."""

    code = "INVALID"


class NotPermitted(DomainError):
    """Known, but not allowed (403)."""

    code = "NOT_PERMITTED"


class NotFound(DomainError):
    """Unknown, or invisible to the caller (404)."""

    code = "NOT_FOUND"


class Conflict(DomainError):
    """Wrong state, wrong round or a duplicate (409)."""

    code = "CONFLICT"


class IllegalMove(Conflict):
    """The table in `lifecycle` has no such move."""

    code = "ILLEGAL_STATE"


class RoundClosed(Conflict):
    """The round is not collecting (any more), or the update names another one."""

    code = "ROUND_CLOSED"


class DuplicateUpdate(Conflict):
    """The same participant has already sent other bytes for this round."""

    code = "DUPLICATE"


class TooManyQuestions(DomainError):
    """So many of the caller's questions wait already; that passes without anybody's doing (429)."""

    code = "TOO_MANY_QUESTIONS"


class TooLarge(DomainError):
    """Over a documented limit (413)."""

    code = "TOO_LARGE"


class UnknownContainer(DomainError):
    """The bytes are none of the containers that are read here (415)."""

    code = "UNKNOWN_CONTAINER"


class Unusable(DomainError):
    """It parses, but may not be used (422)."""

    code = "UNUSABLE"


class BadContainer(Unusable):
    """The container is damaged or dishonest about its contents."""

    code = "BAD_CONTAINER"


class KeyMismatch(Unusable):
    """Tensors are missing, or there are some that the global model does not have."""

    code = "KEY_MISMATCH"


class ShapeMismatch(Unusable):
    """A tensor has another shape than in the global model."""

    code = "SHAPE_MISMATCH"


class DtypeMismatch(Unusable):
    """A tensor has another dtype than in the global model."""

    code = "DTYPE_MISMATCH"


class NonFinite(Unusable):
    """A tensor holds NaN or infinity."""

    code = "NON_FINITE"


class TiedMismatch(Unusable):
    """Tensors that are one in the global model differ."""

    code = "TIED_MISMATCH"


class ChecksumMismatch(DomainError):
    """A piece of an upload was damaged on its way (460, as tus has it)."""

    code = "CHECKSUM_MISMATCH"


class Unavailable(DomainError):
    """The server can't do it now; later, or on another worker, it can (503)."""

    code = "UNAVAILABLE"


class OutOfSpace(DomainError):
    """The disk is full (507); nothing was stored."""

    code = "OUT_OF_SPACE"


class AggregationException(Exception):
    """Updates cannot be combined, for a reason that trying again will not change."""
