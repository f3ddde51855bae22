"""Connections of clients that decide themselves when they say what, and when they listen."""

import contextlib
import http.client
import json
import socket
from dataclasses import dataclass
from typing import Any

ENOUGH = 30.0


@dataclass
class Told:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class _Answers:
    """What a connection says, as the file that `http.client` wants: one answer leaves the next in it."""

    def __init__(self, told: socket.socket) -> None:
        self._file = told.makefile("rb")

    def makefile(self, *_: object) -> "_Answers":
        return self

    def close(self) -> None:
        """More may follow."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class Line:
    """One connection of a client that decides itself when it says what."""

    def __init__(self, port: int, token: str = "", *, room: int = 0) -> None:
        """`room` bytes may be under way to it; 0: as many as the system likes."""
        self.socket = socket.socket()
        self.socket.settimeout(ENOUGH)
        if room:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
        self.socket.connect(("127.0.0.1", port))
        self._answers: Any = _Answers(self.socket)
        self._token = token

    def __enter__(self) -> "Line":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._answers._file.close()
        self.socket.close()

    def ask(self, method: str, path: str, body: bytes = b"", **headers: Any) -> None:
        lines = [f"{method} {path} HTTP/1.1", "Host: localhost"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        if self._token:
            lines.append(f"Authorization: Token {self._token}")
        self.say("\r\n".join([*lines, "", ""]).encode() + body)

    def say(self, data: bytes) -> None:
        self.socket.sendall(data)

    def told(self, method: str = "GET") -> Told:
        response = http.client.HTTPResponse(self._answers, method=method)
        response.begin()
        try:
            headers = {name.lower(): value for name, value in response.getheaders()}
            return Told(response.status, headers, response.read())
        finally:
            response.close()

    def ended(self) -> bool:
        """Whether the server has closed it (and says nothing more)."""
        with contextlib.suppress(ConnectionResetError):
            return bool(self._answers.read(1) == b"")
        return True
