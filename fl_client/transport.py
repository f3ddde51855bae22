"""One way to the server: credentials, patience, typed errors."""

import base64
import contextlib
import email.utils
import logging
import random
import ssl
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

from fl_client.address import Address, speaks_tls, trust
from fl_client.errors import ConnectionFailed, FLError, error_for
from fl_client.packing import WORTH, packer

log = logging.getLogger("fl.client")

Form = Sequence[tuple[str, str]]
PROTOCOL = "1"
SILENCE = 60.0  # seconds without a byte after which a line counts as broken
_AGAIN = (408, 429, 502, 503, 504)  # 408: a line that stood still for a while
_LONGEST_RETRY_AFTER = 300.0
_NO_TLS = (
    "WRONG_VERSION_NUMBER",
    "HTTP_REQUEST",
    "RECORD_LAYER_FAILURE",
)  # what plain HTTP looks like


def backoff(attempt: int, first: float = 0.5, cap: float = 30.0) -> float:
    """Seconds to wait after failed attempt 0, 1, ...: doubling, capped, with half of it jitter."""
    longest = min(cap, first * 2.0 ** min(attempt, 16))
    return longest * random.uniform(0.5, 1.0)  # noqa: S311 - spreads clients, keeps no secret


class Transport:
    """Shared by everything that talks to one server; safe to use from several threads.

    `stop` cuts waits short: a request that would be tried again then raises its last error. `pack`: forms with
    files travel packed where the server reads that and it makes them smaller.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        username: str | None = None,
        password: str | None = None,
        ca: str | Path | None = None,
        attempts: int = 5,
        stop: threading.Event | None = None,
        pack: bool = False,
    ) -> None:
        self.address = Address(url)
        self.attempts = attempts
        self.stop = stop or threading.Event()
        self._pack = pack
        self._offered = ""  # codings that the server reads, as it said last
        self._authorization: str | None = None
        if token is not None:
            self._authorization = f"Token {token}"
        elif username is not None:
            pair = f"{username}:{password or ''}".encode()
            self._authorization = "Basic " + base64.b64encode(pair).decode()
        if self._authorization and self.address.api.scheme == "http" and not self.address.loopback:
            log.warning("credentials travel to %s unencrypted", self.address.api.host)
        self._http = httpx.Client(
            verify=trust(self.address, ca),
            trust_env=not self.address.loopback,
            # Per chunk, not per transfer: a slow line is fine as long as it moves.
            timeout=httpx.Timeout(SILENCE, connect=5.0, pool=None),
            headers={
                "User-Agent": "fl-client/0.1.0",
                "X-FL-Protocol": PROTOCOL,
                # Digests are of the bytes that travel, so nothing may be packed on the way.
                "Accept-Encoding": "identity",
            },
        )

    def close(self) -> None:
        self._http.close()

    def json(
        self,
        method: str,
        url: str,
        *,
        body: Any = None,
        params: dict[str, Any] | None = None,
        form: Form | None = None,
        files: dict[str, Path] | None = None,
        repeatable: bool | None = None,
        key: str | None = None,
        attempts: int | None = None,
        read_timeout: float = 60.0,
    ) -> Any:
        """Ask and return the parsed answer (None where there is none).

        `form` and `files` travel as multipart, files straight from disk. `repeatable` says that
        asking twice does what asking once does; by default GET, PUT and whatever carries an
        idempotency `key`. The rest is tried again only if no connection came about.
        """
        if repeatable is None:
            repeatable = method in ("GET", "PUT") or key is not None
        headers = {} if key is None else {"Idempotency-Key": key}
        if form is not None or files:
            # One boundary for all attempts, so that the same key comes with the same bytes.
            boundary = uuid.uuid5(uuid.NAMESPACE_URL, key) if key else uuid.uuid4()
            headers["Content-Type"] = f"multipart/form-data; boundary={boundary.hex}"

        def once() -> Any:
            with contextlib.ExitStack() as opened:
                parts: list[tuple[str, Any]] = [(n, (None, v)) for n, v in form or ()]
                for name, path in (files or {}).items():
                    parts.append((name, (path.name, opened.enter_context(path.open("rb")))))
                request = self._request(
                    method,
                    url,
                    params=params,
                    json=body,
                    files=parts or None,
                    headers=headers,
                    timeout=httpx.Timeout(read_timeout, connect=5.0, pool=None),
                )
                if self._pack and files and self.address.owns(request.url):
                    request = self._packed(request)
                with self._answer(request) as response:
                    response.read()
                    return _parsed(response)

        return self.patiently(once, repeatable=repeatable, attempts=attempts)

    @contextlib.contextmanager
    def stream(self, url: str, headers: dict[str, str]) -> Iterator[httpx.Response]:
        """A GET whose body has not been read; no retries."""
        with self._answer(self._request("GET", url, headers=headers)) as response:
            yield response

    def headers(
        self,
        method: str,
        url: str,
        *,
        headers: dict[str, str],
        content: Iterator[bytes] | None = None,
    ) -> httpx.Headers:
        """Ask once and return the answer's headers; `content` is sent as it comes, never held whole."""
        request = self._request(method, url, headers=headers, content=content)
        with self._answer(request) as response:
            response.read()
            return response.headers

    def patiently(
        self,
        act: Callable[[], Any],
        *,
        repeatable: bool = True,
        attempts: int | None = None,
        progress: Callable[[], int] = lambda: 0,
    ) -> Any:
        """Call `act` until it succeeds, fails for good, or has failed `attempts` times in a row.

        A failure before which `progress` has grown begins a new row: a bad line is no broken one. What has
        moved once waits for a server that is started again: rows are twice as long then, unless `attempts` is 1.
        """
        failures, reached = 0, progress()
        most = limit = attempts or self.attempts
        while True:
            try:
                return act()
            except FLError as error:
                failures += 1
                if progress() > reached:
                    failures, reached = 1, progress()
                    most = 2 * limit if limit > 1 else 1
                if failures >= most or not worth_repeating(error, repeatable):
                    raise
                pause = _retry_after(error) or 0.0
                pause += backoff(failures - 1)
                log.info("attempt %d failed, next in %.1f s: %s", failures, pause, error.detail)
                if self.stop.wait(pause):
                    raise

    def _request(self, method: str, url: str, **content: Any) -> httpx.Request:
        target = self.address.resolve(url)
        ours = self.address.owns(target)
        if not ours and method != "GET":
            raise FLError(0, "FOREIGN_ORIGIN", f"refused to send data to {target.host}")
        request = self._http.build_request(method, target, **content)
        if ours and self._authorization:
            request.headers["Authorization"] = self._authorization
        if not ours:
            for name in ("X-FL-Protocol", "Cookie"):
                request.headers.pop(name, None)
        return request

    def _packed(self, request: httpx.Request) -> httpx.Request:
        """The same request with a smaller body, if that can be had. All of it is in memory for a moment."""
        found = packer(self._offered)
        if found is None:
            return request
        coding, pack = found
        body = request.read()
        smaller = pack(body)
        if len(smaller) > WORTH * len(body):
            return request
        headers = httpx.Headers(request.headers)
        for name in ("Content-Length", "Transfer-Encoding"):
            headers.pop(name, None)
        headers["Content-Encoding"] = coding
        return httpx.Request(
            request.method,
            request.url,
            headers=headers,
            content=smaller,
            extensions=request.extensions,
        )

    @contextlib.contextmanager
    def _answer(self, request: httpx.Request) -> Iterator[httpx.Response]:
        try:
            response = self._http.send(request, stream=True)
            if self.address.owns(request.url):
                self._offered = response.headers.get("Accept-Encoding", "")
            try:
                if not response.is_success:
                    response.read()
                    raise _refusal(response)
                yield response
            finally:
                response.close()
        except httpx.TransportError as error:
            raise _no_answer(error, request.url) from error


def _parsed(response: httpx.Response) -> Any:
    if not response.content:
        return None
    try:
        return response.json()
    except ValueError:
        detail = f"{response.url} did not answer with JSON; is a proxy in between?"
        raise ConnectionFailed(response.status_code, "NOT_JSON", detail) from None


def _refusal(response: httpx.Response) -> FLError:
    if response.is_redirect:
        where = response.headers.get("Location", "")
        return FLError(response.status_code, "REDIRECTED", f"the server redirects to {where}")
    try:
        body = response.json()
    except ValueError:
        body = None
    if body is None and response.status_code == 400 and b"HTTPS port" in response.content:  # nginx
        where = response.url.netloc.decode()
        return ConnectionFailed(400, "NEEDS_TLS", f"{where} speaks TLS only")
    error = error_for(response.status_code, body, response.headers.get("X-Request-ID"))
    error.retry_after = _seconds(response.headers.get("Retry-After"))
    return error


def _no_answer(error: httpx.TransportError, url: httpx.URL) -> ConnectionFailed:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            detail = f"{url.host} has no certificate that is trusted here: {cause.verify_message}"
            return ConnectionFailed(0, "CERTIFICATE", detail)
        if isinstance(cause, ssl.SSLError) and cause.reason in _NO_TLS:
            return ConnectionFailed(0, "NOT_TLS", f"{url.netloc.decode()} does not speak TLS")
        cause = cause.__cause__ or cause.__context__
    hung_up = isinstance(error, httpx.RemoteProtocolError | httpx.ReadError)
    if hung_up and url.scheme == "http" and speaks_tls(url.host, url.port or 80):
        return ConnectionFailed(0, "NEEDS_TLS", f"{url.netloc.decode()} speaks TLS only")
    never_sent = isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout))
    code = "UNREACHABLE" if never_sent else "INTERRUPTED"
    where = f"{url.host}:{url.port}" if url.port else url.host
    return ConnectionFailed(0, code, f"{where}: {str(error) or type(error).__name__}")


def worth_repeating(error: FLError, repeatable: bool) -> bool:
    """Whether the same request may do better later, and does no harm if it was heard already."""
    if isinstance(error, ConnectionFailed):
        return error.code == "UNREACHABLE" or (repeatable and error.code == "INTERRUPTED")
    return repeatable and error.status in _AGAIN


def _retry_after(error: FLError) -> float | None:
    return None if error.retry_after is None else min(error.retry_after, _LONGEST_RETRY_AFTER)


def _seconds(header: str | None) -> float | None:
    if not header:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except (TypeError, ValueError):
        return None
