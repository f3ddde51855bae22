"""Asks the WSGI application, in a thread, and brings what it says in a form that a coroutine can send."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from django.db import close_old_connections

from fl_server_api.answer_points import SENT

Application = Callable[..., Any]
BLOCK = 2**20
SHORT = 2**16


class File:
    """WSGI's `file_wrapper`: what is sent from a file needs no thread between two blocks."""

    def __init__(self, file: Any, block_size: int = BLOCK) -> None:
        self._file, self._size = file, block_size

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.read, b"")

    def read(self) -> bytes:
        """The next block; empty at the end."""
        return bytes(self._file.read(self._size))

    def close(self) -> None:
        self._file.close()


@dataclass
class Answer:
    """A status, headers, and one of: the whole body, a file, or a stream that takes its time."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes = b""
    file: File | None = None
    stream: Any = None
    sent: list[Callable[[], None]] = field(default_factory=list)  # called once the socket has it

    @property
    def short(self) -> bool:
        """Whether it is sent at once."""
        return self.file is None and self.stream is None and len(self.body) <= SHORT

    @property
    def endless(self) -> bool:
        """Whether it ends when its reader or the server does, rather than with what there is to say."""
        kinds = (value for name, value in self.headers if name.lower() == b"content-type")
        return any(kind.startswith(b"text/event-stream") for kind in kinds)

    def close(self) -> None:
        """End the request of a file or a stream; again does no harm."""
        for source in (self.file, self.stream):
            if source is not None:
                source.close()


def asked(app: Application, environ: dict[str, Any]) -> Answer:
    """Run in a thread. Everything but a file and a stream is finished when it returns."""
    said: list[Any] = []

    def start_response(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> None:
        said[:] = status, headers

    sent: list[Callable[[], None]] = []
    result = app({**environ, "wsgi.file_wrapper": File, SENT: sent}, start_response)
    status, headers = said
    encoded = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
    answer = Answer(int(status[:3]), encoded, sent=sent)
    if isinstance(result, File):
        answer.file = result
    elif getattr(result, "streaming", False):
        answer.stream = result
    else:
        try:
            answer.body = b"".join(result)
        finally:
            getattr(result, "close", lambda: None)()
        if answer.body and not any(name.lower() == b"content-length" for name, _ in answer.headers):
            answer.headers.append((b"content-length", b"%d" % len(answer.body)))
        return answer
    close_old_connections()  # of this thread; another one will end the request
    return answer
