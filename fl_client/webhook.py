"""Receiving notifications: signed, fresh and new ones become a hint to ask the server."""

import hashlib
import hmac
import json
import logging
import threading
import time
from collections import OrderedDict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

log = logging.getLogger("fl.client")

FRESH = 300.0  # seconds
LARGEST = 64 * 1024  # bytes
_REMEMBERED = 4096
TYPES = frozenset(
    {
        "TRAINING_START",
        "UPDATE_ROUND_START",
        "SWAG_ROUND_START",
        "MODEL_TEST_ROUND",
        "TRAINING_FINISHED",
        "CLIENT_REMOVED",
        "INITIAL_WEIGHTS",
    }
)


def sign(secret: str, timestamp: str, body: bytes) -> str:
    """The value of `X-FL-Signature`: HMAC-SHA256 over timestamp, a dot and the raw body."""
    mac = hmac.new(secret.encode(), timestamp.encode() + b"." + body, hashlib.sha256)
    return "sha256=" + mac.hexdigest()


class Gate:
    """Decides which deliveries count. `check` answers with an HTTP status; 202 is a new one."""

    def __init__(self, secret: str) -> None:
        self._secret = secret
        self._seen: OrderedDict[str, None] = OrderedDict()
        self._lock = threading.Lock()

    def check(self, timestamp: str, delivery: str, signature: str, body: bytes) -> int:
        """401 forged or stale, 400 no notification, 200 seen before or unknown type, 202 new."""
        expected = sign(self._secret, timestamp, body)
        if not hmac.compare_digest(expected.encode(), signature.encode("utf-8", "replace")):
            return 401
        try:
            age = time.time() - float(timestamp)
        except ValueError:
            return 401
        if not abs(age) <= FRESH:
            return 401
        # The signature does not cover the delivery id, so a replay could come under a new one.
        if self._repeated(signature, delivery):
            return 200
        try:
            notification = json.loads(body)
            kind, training = notification["notification_type"], notification["training_uuid"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return 400
        if kind not in TYPES:
            log.info("ignoring a notification of unknown type %r", kind)
            return 200
        log.info("%s for training %s", kind, training)
        return 202

    def _repeated(self, *keys: str) -> bool:
        with self._lock:
            repeated = any(key in self._seen for key in keys if key)
            for key in keys:
                if key:
                    self._seen[key] = None
            while len(self._seen) > _REMEMBERED:
                self._seen.popitem(last=False)
        return repeated


class Receiver:
    """An HTTP server on a thread of its own; `hint` is set when there may be something to do."""

    def __init__(self, secret: str, where: tuple[str, int]) -> None:
        self.hint = threading.Event()
        gate, hint = Gate(secret), self.hint

        class Handler(_Handler):
            def notified(self, body: bytes) -> int:
                status = gate.check(
                    self.headers.get("X-FL-Timestamp", ""),
                    self.headers.get("X-FL-Delivery", ""),
                    self.headers.get("X-FL-Signature", ""),
                    body,
                )
                if status == 202:
                    hint.set()
                return status

        self._server = ThreadingHTTPServer(where, Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True)

    @property
    def address(self) -> tuple[str, int]:
        host, port = self._server.server_address[:2]
        return str(host), int(port)

    def wait(self, seconds: float, stop: threading.Event) -> None:
        """Until a hint, until stopped, or for so long."""
        end = time.monotonic() + seconds
        while not stop.is_set() and (left := end - time.monotonic()) > 0:
            if self.hint.wait(min(left, 0.2)):
                return

    def __enter__(self) -> "Receiver":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    timeout = 10.0  # seconds of silence after which a connection is dropped
    server_version = "fl-client"
    sys_version = ""

    def notified(self, body: bytes) -> int:
        raise NotImplementedError

    def do_POST(self) -> None:
        try:
            length = int(self.headers.get("Content-Length", ""))
        except ValueError:
            length = -1
        if length < 0:
            self._reply(411)
        elif length > LARGEST:
            self._reply(413)
        else:
            body = self.rfile.read(length)
            self._reply(self.notified(body) if len(body) == length else 400)

    def _reply(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        log.debug(format, *args)
