"""A client's side of webhooks: an HTTP server on loopback that remembers what it was told."""

import json
import ssl
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Behave = Callable[[BaseHTTPRequestHandler], None]


def answering(status: int, **headers: str) -> Behave:
    def behave(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", "2")
        handler.end_headers()
        handler.wfile.write(b"{}")

    return behave


def hanging_up(handler: BaseHTTPRequestHandler) -> None:
    """No answer at all: for the sender, nobody is there."""


class Endpoint:
    """A client's HTTP server on loopback; `behave` says how it answers, by default and by path."""

    def __init__(self, tls: ssl.SSLContext | None = None, port: int = 0) -> None:
        self.behave: Behave = answering(200)
        self.at: dict[str, Behave] = {}
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        self.connections = 0
        self.release = threading.Event()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def setup(self) -> None:
                endpoint.connections += 1
                super().setup()

            def do_POST(self) -> None:
                raw = self.rfile.read(int(self.headers["Content-Length"]))
                endpoint.requests.append((self.path, dict(self.headers.items()), raw))
                endpoint.at.get(self.path, endpoint.behave)(self)

            def log_message(self, format: str, *args: Any) -> None: ...

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                """Senders hang up on slow endpoints; that is what is tested."""

        self.server = Server(("127.0.0.1", port), Handler)
        if tls is not None:
            self.server.socket = tls.wrap_socket(self.server.socket, server_side=True)
        self.port = self.server.server_port
        self.url = f"http://127.0.0.1:{self.port}/hook"
        self._thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def messages(self, path: str | None = None) -> list[dict[str, Any]]:
        return [json.loads(raw) for at, _, raw in self.requests if path in {None, at}]

    def types(self, path: str | None = None) -> list[str]:
        return [message["notification_type"] for message in self.messages(path)]

    def close(self) -> None:
        self.release.set()
        self.server.shutdown()
        self.server.server_close()
        self._thread.join()
