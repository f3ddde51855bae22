# ruff: noqa: INP001 - a script
"""Exit 0 if the URL answers at all below 500, as it would to the proxy; standard library only."""

import sys
import urllib.error
import urllib.request

request = urllib.request.Request(  # noqa: S310 - compose gives a fixed http URL
    sys.argv[1], headers={"Host": "localhost", "X-Forwarded-Proto": "https"}
)
try:
    with urllib.request.urlopen(request, timeout=4) as answer:  # noqa: S310
        status = answer.status
except urllib.error.HTTPError as error:
    status = error.code
except OSError as error:
    sys.exit(f"no answer: {error}")
sys.exit(status >= 500)
