"""A long-poll: Django is asked now, and again after each wake-up; in between a coroutine waits."""

import asyncio
import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fl_server.front.answers import Answer
from fl_server_ai.notifications import wakeups
from fl_server_ai.services.places import POLLS
from fl_server_api.polling import POLL, Poll

if TYPE_CHECKING:
    from fl_server.front.app import Front


async def polled(
    front: "Front", environ: Callable[[], dict[str, Any]], gone: asyncio.Task[None]
) -> Answer | None:
    """The last answer; None if the client has hung up. `environ` makes a new one for each time.

    Each time is a whole request to Django: a token that was revoked meanwhile is refused. Only so many
    (`front.asking`) are asked at once. Who finds no place is answered at once.
    """
    answer, poll = await _ask(front, environ, gone)
    if poll.seconds <= 0:
        return answer
    loop = asyncio.get_running_loop()
    deadline = loop.time() + poll.seconds
    changed = asyncio.Event()

    def tell() -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(changed.set)

    gone.add_done_callback(lambda _: changed.set())
    front.waiting.add(changed)
    try:
        with POLLS.one(poll.user) as granted, wakeups.listening(poll.user, tell):
            while granted and poll.seconds > 0 and not front.stopping:
                if wakeups.generation(poll.user) == poll.seen and not await _in_time(
                    changed, deadline
                ):
                    break
                changed.clear()
                if gone.done():
                    return None
                if wakeups.generation(poll.user) != poll.seen and not front.stopping:
                    answer, poll = await _ask(front, environ, gone)
    finally:
        front.waiting.discard(changed)
    return answer


async def _ask(
    front: "Front", environ: Callable[[], dict[str, Any]], gone: asyncio.Task[None]
) -> tuple[Answer | None, Poll]:
    """None for a client who has hung up before it was his turn: when many come back at once, many do."""
    poll = Poll()
    async with front.asking:
        if gone.done():
            return None, poll
        answer = await front.ask({**environ(), POLL: poll})
    return answer, poll


async def _in_time(changed: asyncio.Event, deadline: float) -> bool:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout_at(deadline):
            await changed.wait()
    return changed.is_set()
