"""How many large bodies one user may have under way at a time, where the server counts them."""

from typing import Protocol

from rest_framework.exceptions import Throttled
from rest_framework.request import Request

TRANSFER = "fl.transfer"  # in a request's META; no client can put it there
RETRY_SECONDS = 5


class Transfer(Protocol):
    """A body that is too large to be read before the request is looked at."""

    def admit(self, user_id: str) -> bool:
        """Whether this user may send one more. Bodies that are read without it count as nobody's."""


def admit(request: Request) -> None:
    """Raise `Throttled` (429) if the caller has too many bodies under way; the body is not read then."""
    transfer: Transfer | None = request._request.META.get(TRANSFER)
    if transfer is None or not request.user.is_authenticated:
        return
    if not transfer.admit(str(request.user.pk)):
        said = "too many of your uploads are under way; wait until one has ended."
        raise Throttled(wait=RETRY_SECONDS, detail=said)
