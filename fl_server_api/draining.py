"""Reads on for a while after a refusal, so that clients who are still sending see the answer."""

from django.http import HttpRequest, UnreadablePostError

DRAINED = 8 * 2**20
FRONT = "fl.drains"  # in a request's META where the server does this itself, without a thread


def drain(request: HttpRequest) -> None:
    """Read and forget up to 8 MB of the body that nobody wants; more than that is cut off."""
    if FRONT in request.META:
        return
    stream = getattr(request, "_stream", None)
    stream = getattr(stream, "raw", stream)  # what travels, also where it can't be unpacked
    left = DRAINED
    try:
        while stream is not None and left > 0:
            block = stream.read(min(left, 2**18))
            if not block:
                return
            left -= len(block)
    except (OSError, UnreadablePostError, ValueError):
        return  # the client has gone, or the body was read to its end and closed
