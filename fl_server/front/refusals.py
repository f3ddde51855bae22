"""What the front refuses by itself, in the form of the API's errors."""

import json

from fl_server.front.answers import Answer

RETRY_SECONDS = 5
REFUSALS = {
    "BAD_REQUEST": (400, "this is no valid HTTP request"),
    "TOO_SLOW": (408, "this came too slowly; send it again when the line is better"),
    "LENGTH_REQUIRED": (411, "a body of more than 64 KiB needs a Content-Length"),
    "HEAD_TOO_LARGE": (431, "the request's head may have 64 KiB"),
    "TOO_MANY_BODIES": (503, "too many uploads are under way; try again in a moment"),
}


def refusal(code: str) -> Answer:
    """One of `REFUSALS`; with `Retry-After` where trying again helps."""
    status, detail = REFUSALS[code]
    body = json.dumps({"detail": detail, "code": code}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    if status == 503:
        headers.append((b"retry-after", b"%d" % RETRY_SECONDS))
    return Answer(status, headers, body)
