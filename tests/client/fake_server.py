"""A server that speaks the client's side of the wire contract, on loopback, from memory."""

import hashlib
import json
import re
import ssl
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

from safetensors.numpy import load, save

Headers = dict[str, str]


@dataclass
class Asked:
    """One request as it arrived."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def form(self) -> dict[str, list[str]]:
        fields = defaultdict(list)
        for name, filename, value in self._parts():
            if filename is None:
                fields[name].append(value.decode())
        return dict(fields)

    @property
    def files(self) -> dict[str, bytes]:
        return {name: value for name, filename, value in self._parts() if filename is not None}

    def _parts(self) -> list[tuple[str, str | None, bytes]]:
        boundary = self.headers["Content-Type"].partition("boundary=")[2].encode()
        parts = []
        for part in self.body.split(b"--" + boundary)[1:-1]:
            head, _, value = part.partition(b"\r\n\r\n")
            name = re.search(rb' name="([^"]*)"', head)
            filename = re.search(rb' filename="([^"]*)"', head)
            assert name
            parts.append((name[1].decode(), filename[1].decode() if filename else None, value[:-2]))
        return parts


@dataclass
class Reply:
    status: int = 200
    body: Any = None
    headers: Headers = field(default_factory=dict)
    cut: int | None = None  # bytes after which the connection breaks


def refusal(status: int, code: str, **headers: str) -> Reply:
    body = {"detail": f"no: {code}", "code": code, "request_id": "r-1"}
    return Reply(status, body, {name.replace("_", "-"): value for name, value in headers.items()})


class FakeServer:
    """`tasks` are handed out in order; each stays until it is answered. `faults[path]` come first."""

    def __init__(self, port: int = 0, tls: ssl.SSLContext | None = None) -> None:
        self.asked: list[Asked] = []
        self.faults: dict[str, list[Reply | Callable[[], None]]] = defaultdict(list)
        self.routes: dict[tuple[str, str], Callable[[Asked], Reply]] = {}
        self.tasks: list[dict[str, Any]] = []
        self.models: dict[str, bytes] = {}
        self.updates: list[Asked] = []
        self.failures: list[dict[str, Any]] = []
        self.metrics: list[Asked] = []
        self.ending: dict[str, Any] = {"state": "done", "final_model": {"id": "m"}}
        self.lock = threading.RLock()
        fake = self

        class Handler(_Handler):
            def answer(self, asked: Asked) -> Reply:
                return fake.answer(asked)

        self._http = _Server(("127.0.0.1", port), Handler)
        if tls is not None:
            self._http.socket = tls.wrap_socket(self._http.socket, server_side=True)
        self._thread = threading.Thread(
            target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def seen(self, path: str) -> list[Asked]:
        return [asked for asked in self.asked if asked.path == path]

    def add_model(self, weights: Mapping[str, Any], model: str = "m") -> bytes:
        self.models[model] = save(dict(weights))
        return self.models[model]

    def add_task(self, kind: str = "train", *, round: int = 0, **changes: Any) -> dict[str, Any]:
        task = {
            "id": f"task-{len(self.tasks)}-{round}-{kind}",
            "kind": kind,
            "training": "t",
            "round": round,
            "model": {
                "id": "m",
                "version": round,
                "url": "/api/models/m/",
                "sha256": hashlib.sha256(self.models["m"]).hexdigest(),
                "bytes": len(self.models["m"]),
                "container": "safetensors",
            },
            "upload_url": "/api/models/m/",
            "config": {"mu": 0.01},
            "created_at": "2026-01-01T00:00:00Z",
            "deadline": None,
        } | changes
        self.tasks.append(task)
        return task

    def update_weights(self, index: int) -> dict[str, Any]:
        return load(self.updates[index].files["model_file"])

    def answer(self, asked: Asked) -> Reply:
        with self.lock:
            self.asked.append(asked)
            queued = self.faults[asked.path]
            fault = queued.pop(0) if queued else None
        if isinstance(fault, Reply):
            return fault
        if fault is not None:
            fault()
        route = self.routes.get((asked.method, asked.path))
        if route is not None:
            return route(asked)
        with self.lock:
            return self.contract(asked)

    def contract(self, asked: Asked) -> Reply:
        if asked.path == "/api/tasks/":
            if self.tasks:
                return Reply(body={"state": "task", "task": self.tasks[0]})
            return Reply(body=self.ending)
        if asked.path == "/api/users/myself/webhook-secret/":
            return Reply(body={"webhook_secret": "s3cret"})
        if asked.path.endswith("/failure/"):
            self.failures.append(asked.json)
            self.tasks.pop(0)
            return Reply(body={"detail": "ok"})
        if asked.path.endswith("/progress/"):
            return Reply(body={"command": None, "deadline": None})
        if asked.path == "/api/models/m/metrics/":
            self.metrics.append(asked)
            self.tasks.pop(0)
            return Reply(201, {"detail": "ok", "model_id": "m"})
        model = re.fullmatch(r"/api/models/(\w+)/", asked.path)
        if model and asked.method == "POST":
            self.updates.append(asked)
            self.tasks.pop(0)
            return Reply(201, {"detail": "ok"})
        if model and model[1] in self.models:
            return deliver(asked, self.models[model[1]])
        return refusal(404, "NOT_FOUND")


def deliver(asked: Asked, data: bytes) -> Reply:
    """Bytes under their digest, from where the client wants them."""
    etag = f'"{hashlib.sha256(data).hexdigest()}"'
    wanted = re.fullmatch(r"bytes=(\d+)-", asked.headers.get("Range", ""))
    if wanted and asked.headers.get("If-Range", etag) == etag:
        start = int(wanted[1])
        span = f"bytes {start}-{len(data) - 1}/{len(data)}"
        return Reply(206, data[start:], {"ETag": etag, "Content-Range": span})
    return Reply(200, data, {"ETag": etag})


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are what some tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, asked: Asked) -> Reply:
        raise NotImplementedError

    def _handle(self) -> None:
        url = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        reply = self.answer(
            Asked(self.command, url.path, parse_qs(url.query), dict(self.headers), body)
        )
        raw = isinstance(reply.body, bytes)
        data = reply.body if raw else json.dumps(reply.body).encode()
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else data[: reply.cut])
        if reply.cut is not None:
            self.close_connection = True

    def do_GET(self) -> None:
        self._handle()

    def do_POST(self) -> None:
        self._handle()

    def do_HEAD(self) -> None:
        self._handle()

    def do_PATCH(self) -> None:
        self._handle()

    def do_PUT(self) -> None:
        self._handle()

    def do_DELETE(self) -> None:
        self._handle()

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""
