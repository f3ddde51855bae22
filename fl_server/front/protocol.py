"""uvicorn's HTTP protocol, with limits for request heads, which it has not."""

import asyncio
from collections.abc import Sized
from typing import Any

from httptools import HttpParserError, HttpParserUpgrade
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from fl_server.front.refusals import refusal

HEAD_BYTES = 2**16
HEAD_SECONDS = 30.0
GOODBYE_SECONDS = 120.0
PIPELINED = 8  # requests of one connection that wait for those before them


class Flow(FlowControl):
    """Reads nothing more from a connection while requests of it wait for their turn."""

    def __init__(self, transport: asyncio.Transport, waiting: Sized) -> None:
        super().__init__(transport)
        self._waiting = waiting
        self.discarding = False  # what is read is not kept

    def resume_reading(self) -> None:
        if self.discarding or not self._waiting:
            super().resume_reading()


class Protocol(HttpToolsProtocol):
    """A head has 30 seconds from its first byte (the first one: from the connection) and 64 KiB.

    What is no HTTP is answered in the form of our errors, and not logged: anybody can send it. Of requests that
    are sent before their turn a few are answered; then the connection ends, and who wants more makes another.
    """

    _unused = 0  # bytes since the parser last had something to tell
    _in_head = True
    flow: Flow
    _head_timer: asyncio.TimerHandle | None = None
    _running: RequestResponseCycle | None = None  # `cycle` is the one that was sent last

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]
        self.flow = Flow(self.transport, self.pipeline)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_timer()
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()
        super().connection_lost(exc)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        if self.flow.discarding:
            return
        self._unused += len(data)
        try:
            self._parse(data)
        except HttpParserError:
            if not self.flow.discarding:
                self._refuse("BAD_REQUEST")
        if self._unused > HEAD_BYTES:
            self._refuse("HEAD_TOO_LARGE")
        elif self._in_head and self._unused:
            self._expect_head()

    def _parse(self, data: bytes) -> None:
        """Offers of another protocol are taken for not made, which the parser can't be told: it takes the head again."""
        while data:
            try:
                self.parser.feed_data(data)
            except HttpParserUpgrade as offer:
                data = self._head_without_offer() + data[offer.args[0] :]
            else:
                return

    def _head_without_offer(self) -> bytes:
        method, version = self.parser.get_method(), self.parser.get_http_version().encode()
        kept = [pair for pair in self.headers if pair[0] != b"upgrade"]
        lines = [
            b"%b %b HTTP/%b\r\n" % (method, self.url, version),
            *(b"%b: %b\r\n" % pair for pair in kept),
        ]
        return b"".join([*lines, b"\r\n"])

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._limit_goodbye()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._limit_goodbye()

    def shutdown(self) -> None:
        stop = getattr(self.app, "stop", None)
        if stop is not None:
            stop()
        super().shutdown()

    # --- what the parser tells ---

    def on_message_begin(self) -> None:
        if len(self.pipeline) >= PIPELINED:
            self._enough()
        super().on_message_begin()
        self.scope["extensions"] = {"fl.abort": {"call": self.transport.abort}}

    def on_header(self, name: bytes, value: bytes) -> None:
        """Fields after a body would pass for those before it, which a proxy has looked at."""
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                raise ValueError("this is no proxy")
            return
        self._unused, self._in_head = 0, False
        self._forget_timer()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._unused = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._unused, self._in_head = 0, True
        super().on_message_complete()

    def _enough(self) -> None:
        """The requests that are here are the last. Read on: closed with unread bytes, it would lose the answers."""
        self.cycle.keep_alive = False
        self.flow.discarding = True
        self.flow.resume_reading()
        raise ValueError("the parser ends here")

    # --- refusals ---

    def _expect_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_SECONDS, self._head_late)

    def _forget_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_late(self) -> None:
        self._head_timer = None
        if self._answering:
            self._expect_head()  # of the next request, which is sent before its turn
        else:
            self._refuse("TOO_SLOW")

    @property
    def _answering(self) -> bool:
        cycle: RequestResponseCycle | None = self.cycle
        return cycle is not None and not cycle.response_complete

    def _refuse(self, code: str) -> None:
        if not self._answering and not self.transport.is_closing():
            answer = refusal(code)
            headers = [*answer.headers, (b"connection", b"close")]
            lines = [
                b"HTTP/1.1 %d \r\n" % answer.status,
                *(b"%s: %s\r\n" % pair for pair in headers),
            ]
            self.transport.write(b"".join([*lines, b"\r\n", answer.body]))
        self.transport.close()
        self._limit_goodbye()

    def _limit_goodbye(self) -> None:
        """A closed connection stays until its last answer is read: not for ever."""
        if self.transport.is_closing() and self.transport.get_write_buffer_size():
            self.loop.call_later(GOODBYE_SECONDS, self.transport.abort)
