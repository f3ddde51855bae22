"""Stands for nginx: ends TLS, adds the headers that deploy/nginx.conf.template adds, passes bytes on."""

import contextlib
import socket
import ssl
import threading

import trustme


class TlsProxy:
    """One request a connection. `requests` holds the first line of each that arrived."""

    def __init__(self, backend: tuple[str, int], ca: trustme.CA) -> None:
        self._backend = backend
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        ca.issue_cert("localhost", "127.0.0.1").configure_cert(self._context)
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port = int(self._socket.getsockname()[1])
        self.requests: list[str] = []
        threading.Thread(target=self._accept, daemon=True, name="proxy").start()

    def close(self) -> None:
        self._socket.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._socket.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, raw: socket.socket) -> None:
        raw.settimeout(120)
        with (
            contextlib.suppress(OSError),
            raw,
            self._context.wrap_socket(raw, server_side=True) as client,
        ):
            head, rest = _head(client)
            self.requests.append(head[0])
            with socket.create_connection(self._backend, timeout=120) as backend:
                backend.sendall("\r\n".join([*head, "", ""]).encode("latin-1") + rest)
                up = threading.Thread(target=_pump, args=(client, backend), daemon=True)
                up.start()
                _pump(backend, client)
                # Before the close: a thread that still reads would read from whoever gets the
                # number of this file descriptor next.
                client.shutdown(socket.SHUT_RDWR)
                up.join()


def _head(client: ssl.SSLSocket) -> tuple[list[str], bytes]:
    data = b""
    while b"\r\n\r\n" not in data:
        more = client.recv(65_536)
        if not more:
            raise ConnectionError
        data += more
    head, _, rest = data.partition(b"\r\n\r\n")
    lines = [
        line
        for line in head.decode("latin-1").split("\r\n")
        if not line.lower().startswith(("connection:", "x-forwarded-"))
    ]
    added = ["Connection: close", "X-Forwarded-Proto: https", "X-Forwarded-For: 127.0.0.1"]
    return [*lines, *added], rest


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65_536):
            sink.sendall(data)
