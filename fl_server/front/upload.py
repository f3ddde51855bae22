"""A large body on its way: the event loop fills it, a thread reads it, and neither runs far ahead."""

import asyncio
import sys
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from fl_server.front.pace import Pace

BLOCK = 2**20  # what a thread is woken for
AHEAD = 2 * BLOCK  # bytes held before the client has to wait
PIECE = 2**16  # who asks for more wants it whole: a body that comes this way is longer
LINE = 2**12
Receive = Callable[[], Awaitable[Mapping[str, Any]]]


class Upload:
    """The `wsgi.input` of one request. Nothing is asked of the client before the first `read`.

    `admitted` is asked at that moment; who is not, gets `OSError`, like everybody whose client has gone.
    """

    def __init__(self, admitted: Callable[[], bool]) -> None:
        self._loop = asyncio.get_running_loop()
        self._admitted = admitted
        self._changed = threading.Condition()
        self._pieces: deque[memoryview] = deque()
        self._held = self._wanted = 0
        self._ended = self._blocked = False
        self._error: OSError | None = None
        self._begin, self._room = asyncio.Event(), asyncio.Event()
        self.begun = self.refused = False

    # --- the thread's side ---

    def read(self, size: int | None = -1) -> bytes:
        """`size` bytes, fewer at the end; all if None or negative.

        Where the client is lost before: a read of `PIECE` or less gives what has come, so that an upload can go
        on there, and the next one raises. A larger one raises: a form that is cut off would pass for a whole one.
        """
        if size is not None and 0 <= size <= PIECE:
            return b"".join(self._take(size)) if size else b""
        left = sys.maxsize if size is None or size < 0 else size
        taken: list[memoryview] = []
        while left and (some := self._take(left)):
            taken += some
            left -= sum(map(len, some))
        return b"".join(taken)

    def readline(self, size: int | None = -1) -> bytes:
        """Up to and with the next line feed, at most 1 MiB: Django asks for lines only to throw them away."""
        limit = BLOCK if size is None or size < 0 else min(size, BLOCK)
        line = b""
        while piece := self.read(min(LINE, limit - len(line))):
            end = piece.find(b"\n") + 1 or len(piece)
            line += piece[:end]
            if end < len(piece):
                with self._changed:
                    self._pieces.appendleft(memoryview(piece)[end:])
                    self._held += len(piece) - end
            if line.endswith(b"\n"):
                break
        return line

    def _take(self, size: int) -> list[memoryview]:
        with self._changed:
            if not self.begun:
                self.refused = not self._admitted()
                if self.refused:
                    raise OSError("too many bodies are being read")
                self.begun = True
                self._tell(self._begin)
            self._wanted = min(size, BLOCK)
            self._changed.wait_for(lambda: self._held >= self._wanted or self._ended)
            if not self._held and self._error:
                raise self._error
            taken = self._cut(size)
            if self._blocked and self._held < AHEAD:
                self._blocked = False
                self._tell(self._room)
        return taken

    def _cut(self, size: int) -> list[memoryview]:
        taken: list[memoryview] = []
        left = size
        while left and self._pieces:
            piece = self._pieces.popleft()
            if len(piece) > left:
                self._pieces.appendleft(piece[left:])
                piece = piece[:left]
            taken.append(piece)
            left -= len(piece)
        self._held -= size - left
        return taken

    def _tell(self, event: asyncio.Event) -> None:
        self._loop.call_soon_threadsafe(event.set)

    # --- the event loop's side ---

    async def fill(self, receive: Receive, pace: Pace) -> None:
        """Bring the body, once it is wanted. `TimeoutError` if the client is too slow for `pace`."""
        try:
            await self._begin.wait()
            while True:
                message = await pace.wait(receive())
                pace.moved(len(message["body"]))
                if self._put(message["body"]):
                    await self._room.wait()
                if not message["more_body"]:
                    break
        except BaseException:
            self.end(OSError("the client has gone, or is too slow"))
            raise
        self.end()

    def _put(self, piece: bytes) -> bool:
        """Whether that fills it."""
        with self._changed:
            if piece:
                self._held += len(piece)
                if self._pieces and len(piece) + len(self._pieces[-1]) <= LINE:
                    piece = bytes(self._pieces.pop()) + piece  # not an object for each byte
                self._pieces.append(memoryview(piece))
            if self._held >= self._wanted:
                self._changed.notify()
            self._blocked = self._held >= AHEAD
            if self._blocked:
                self._room.clear()
            return self._blocked

    def end(self, error: OSError | None = None) -> None:
        """Nothing more comes; a thread that waits goes on."""
        with self._changed:
            self._ended = True
            self._error = self._error or error
            self._changed.notify()
