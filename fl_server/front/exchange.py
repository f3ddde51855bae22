"""One request and its answer, as coroutines."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Mapping
from io import BytesIO
from typing import TYPE_CHECKING, Any

from django.conf import settings

from fl_server.front.admission import Admission
from fl_server.front.answers import SHORT, Answer
from fl_server.front.environ import environ_of
from fl_server.front.pace import Pace
from fl_server.front.polls import polled
from fl_server.front.refusals import refusal
from fl_server.front.upload import Upload
from fl_server_api.draining import DRAINED, FRONT
from fl_server_api.transfers import TRANSFER

if TYPE_CHECKING:
    from fl_server.front.app import Front, Receive, Scope, Send

SMALL = 2**16  # bodies up to here are read before a thread is used
PIECE = SHORT  # of an answer, between two looks at the client's pace
DRAIN_SECONDS = 10.0
LINGER_SECONDS = 5.0
PATIENCE = 4  # a reader may be silent so many times longer than a sender: buffers hide his progress


class Gone(Exception):
    """The client has hung up."""


class Exchange:
    """`run` serves one request to its end; who is too slow is answered 408 and cut off."""

    def __init__(self, front: "Front", scope: "Scope", receive: "Receive", send: "Send") -> None:
        self.front, self.scope = front, scope
        self._receive, self._send = receive, send
        headers = dict(scope["headers"])
        self._length = int(headers.get(b"content-length", b"0"))
        self._chunked = b"transfer-encoding" in headers
        # Who waits for a "100 Continue", or has given up, sends nothing that could be read on.
        self._silent = headers.get(b"expect", b"").lower() == b"100-continue"
        self._more = self._chunked or self._length > 0  # of the body, on the other side

    async def run(self) -> None:
        with contextlib.suppress(Gone):
            try:
                answer = await self._answer()
            except TimeoutError:
                self._silent = True
                answer = refusal("TOO_SLOW")
            if answer is not None:
                await self._finish(answer)

    async def _answer(self) -> Answer | None:
        """None if the client left while it waited."""
        if self._length > SMALL:
            return await self._transfer()
        body = await self._small()
        if body is None:
            return refusal("LENGTH_REQUIRED")

        def environ() -> dict[str, Any]:
            made = environ_of(self.scope, BytesIO(body), len(body))
            return {**made, FRONT: True}

        if self.front.is_poll(self.scope):
            async with self._leaving() as gone:
                return await polled(self.front, environ, gone)
        return await self.front.ask(environ())

    async def _small(self) -> bytes | None:
        """The whole body; None if it is larger than it may be without saying so."""
        pace, parts, size = self._pace(), [], 0
        while self._more:
            body = (await pace.wait(self._next()))["body"]
            pace.moved(len(body))
            parts.append(body)
            size += len(body)
            if size > SMALL:
                return None
        return b"".join(parts)

    async def _transfer(self) -> Answer:
        with Admission(self.front.bodies) as admission:
            upload = Upload(admission.certain)
            environ = environ_of(self.scope, upload, self._length)
            filling = asyncio.create_task(upload.fill(self._next, self._pace()))
            try:
                answer = await self.front.ask(
                    {**environ, FRONT: True, TRANSFER: admission}, large=True
                )
            finally:
                filling.cancel()
                upload.end(OSError("the request has ended"))
                await asyncio.wait({filling})
        self._silent &= not upload.begun
        if upload.refused:
            return refusal("TOO_MANY_BODIES")
        if not filling.cancelled() and (error := filling.exception()) is not None:
            self.front.close(answer)
            raise error  # Gone, or TimeoutError
        return answer

    def _pace(self) -> Pace:
        return Pace(settings.FL_STALLED_SECONDS, settings.FL_SLOWEST_TRANSFER)

    async def _next(self) -> Mapping[str, Any]:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise Gone
        self._more = message["more_body"]
        return message

    @contextlib.asynccontextmanager
    async def _leaving(self) -> AsyncIterator[asyncio.Task[None]]:
        """A task that ends when the client hangs up. The body must have been read."""

        async def leave() -> None:
            with contextlib.suppress(Gone):
                while True:
                    await self._next()

        task = asyncio.create_task(leave())
        try:
            yield task
        finally:
            task.cancel()

    # --- the answer ---

    async def _finish(self, answer: Answer) -> None:
        try:
            await self._deliver(answer)
            for tell in answer.sent:
                tell()
        except TimeoutError:
            await self._abort()
        finally:
            self.front.close(answer)

    async def _deliver(self, answer: Answer) -> None:
        headers = [*answer.headers]
        if self._more and not await self._drained():
            headers.append((b"connection", b"close"))
        start = {"type": "http.response.start", "status": answer.status, "headers": headers}
        at_once = answer.short or self.scope["method"] == "HEAD"
        unwanted = self._more and not self._silent  # the client is still sending
        async with asyncio.timeout(PATIENCE * settings.FL_STALLED_SECONDS):
            await self._send(start)
            if at_once:
                body = {"type": "http.response.body", "body": answer.body}
                await self._send({**body, "more_body": unwanted})
        if not at_once:
            async with self._leaving() as gone:
                await self._send_long(answer, gone)
        if unwanted and answer.stream is None:  # a stream's end is what its reader waits for
            await self._linger()
        if unwanted or not at_once:
            await self._send({"type": "http.response.body"})

    async def _drained(self) -> bool:
        """Read on for a while, so that a client that is still sending sees the answer; whether that was all."""
        left = 0 if self._silent else DRAINED
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_SECONDS):
                while self._more and left > 0:
                    left -= len((await self._next())["body"])
        return not self._more

    async def _linger(self) -> None:
        """Read on after the answer: closing before would reset the connection, and may take the answer back."""
        with contextlib.suppress(TimeoutError, Gone):
            async with asyncio.timeout(LINGER_SECONDS):
                while self._more:
                    await self._next()

    async def _send_long(self, answer: Answer, gone: asyncio.Task[None]) -> None:
        """All but the end."""
        pace = Pace(PATIENCE * settings.FL_STALLED_SECONDS, settings.FL_SLOWEST_TRANSFER)

        async def send(block: bytes) -> None:
            view = memoryview(block)
            for start in range(0, len(block), PIECE):
                if gone.done():
                    raise Gone
                piece = view[start : start + PIECE]
                body = {"type": "http.response.body", "body": piece, "more_body": True}
                await pace.wait(self._send(body))
                pace.moved(len(piece))

        if answer.stream is not None:
            with self._stoppable(answer):
                await self._pump(answer.stream, send)
        elif answer.file is not None:
            while block := await self.front.read(answer):
                await send(block)
        else:
            await send(answer.body)
        if gone.done():
            raise Gone

    @contextlib.contextmanager
    def _stoppable(self, answer: Answer) -> Iterator[None]:
        """Within the block a server that stops can cut an endless answer off: its reader may not read."""
        cut = self.scope["extensions"]["fl.abort"]["call"]
        if answer.endless:
            self.front.endless.add(cut)
        try:
            yield
        finally:
            self.front.endless.discard(cut)

    async def _pump(self, stream: Any, send: Any) -> None:
        """Blocks as a thread makes them; one at a time is on its way."""
        loop = asyncio.get_running_loop()

        def iterate() -> None:
            try:
                for block in stream:
                    asyncio.run_coroutine_threadsafe(send(block), loop).result()
            finally:
                stream.close()

        await self.front.iterate(iterate)

    async def _abort(self) -> None:
        """Cut a reader off who doesn't read."""
        self.scope["extensions"]["fl.abort"]["call"]()
        with contextlib.suppress(Gone):
            while True:
                await self._next()
