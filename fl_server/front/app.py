"""The ASGI application around Django: which requests need which threads, and the pools themselves."""

import asyncio
import re
import threading
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from django.conf import settings

from fl_server.front.answers import Answer, Application, asked
from fl_server.front.exchange import Exchange
from fl_server_ai.notifications import wakeups
from fl_server_ai.services.places import Places
from fl_server_api.stopping import STOP

Scope = Mapping[str, Any]
Receive = Callable[[], Awaitable[Mapping[str, Any]]]
Send = Callable[[Mapping[str, Any]], Awaitable[None]]

POLL = re.compile(r"/api/(v1/)?tasks/")
# Small questions that take their time: a model that is asked, weights that are written out first, an upload
# that is named as an update and waits for its turn, or whose last piece has the whole of it read.
SLOW = re.compile(
    r"[A-Z]+ /api/(v1/)?(inference/|models/[^/]+/(calibration/|extras/|preprocessing/|swag/)?)"
    r"|POST /api/(v1/)?(models/|tasks/[^/]+/result/)|PATCH /api/(v1/)?uploads/[^/]+/"
)
FILE_THREADS = 4
STREAM_SECONDS = 1.0  # to end a stream of events in, once the server stops


class Front:
    """`threads` serve what is quick, `transfers` large bodies, streams and what is slow.

    Neither can take threads from the other. One user's bodies get a quarter of `transfers` at most, all
    together three quarters.
    """

    def __init__(self, app: Application, *, threads: int, transfers: int) -> None:
        self.app = app
        self.waiting: set[asyncio.Event] = set()  # long-polls
        self.endless: set[Callable[[], None]] = set()  # what cuts off each stream of events
        self._stop = threading.Event()
        self.asking = asyncio.Semaphore(max(1, threads // 2))  # of them, those that ask just now
        self.bodies = Places(lambda: max(1, transfers * 3 // 4), lambda: max(1, transfers // 4))
        self._control = ThreadPoolExecutor(threads, "control")
        self._transfers = ThreadPoolExecutor(transfers, "transfer")
        self._files = ThreadPoolExecutor(FILE_THREADS, "file")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await Exchange(self, scope, receive, send).run()

    def stop(self) -> None:
        """Have the long-polls answered and streams of events ended now. In the event loop, any number of times."""
        if self.stopping:
            return
        wakeups.stopped(self._stop)
        for event in self.waiting:
            event.set()
        for cut in self.endless:
            asyncio.get_running_loop().call_later(STREAM_SECONDS, cut)

    @property
    def stopping(self) -> bool:
        return self._stop.is_set()

    def end(self) -> None:
        """No more requests: threads go when they are done."""
        for pool in (self._control, self._transfers, self._files):
            pool.shutdown(wait=False, cancel_futures=True)

    def is_poll(self, scope: Scope) -> bool:
        asks = scope["method"] == "GET" and b"wait=" in scope["query_string"]
        return asks and bool(POLL.fullmatch(scope["path"]))

    async def ask(self, environ: dict[str, Any], *, large: bool = False) -> Answer:
        """What Django says to this, in a thread of the pool that is meant for it."""
        asked_for = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}"
        slow = large or bool(SLOW.fullmatch(asked_for))
        pool = self._transfers if slow else self._control
        environ = {**environ, STOP: self._stop}
        return await asyncio.get_running_loop().run_in_executor(pool, asked, self.app, environ)

    async def read(self, answer: Answer) -> bytes:
        """The next block of an answer's file."""
        assert answer.file is not None  # noqa: S101 - it was asked for
        return await asyncio.get_running_loop().run_in_executor(self._files, answer.file.read)

    async def iterate(self, work: Callable[[], None]) -> None:
        """Run what iterates over a stream, in one thread from start to end."""
        await asyncio.get_running_loop().run_in_executor(self._transfers, work)

    def close(self, answer: Answer) -> None:
        """End the request of a file or a stream, in some thread, soon."""
        if answer.file is not None or answer.stream is not None:
            self._files.submit(answer.close)


def front(app: Application) -> Front:
    """As the settings say."""
    return Front(app, threads=settings.FL_WEB_THREADS, transfers=settings.FL_TRANSFER_THREADS)
