"""Ends requests whose clients are silent, or slower than anybody may be; only waiting for them counts."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


class Pace:
    """Watches one direction of one request.

    `TimeoutError` after `silence` seconds without anything, and when in as many seconds of waiting fewer than
    `floor` bytes a second have come through.
    """

    def __init__(self, silence: float, floor: float) -> None:
        self._silence, self._floor = silence, floor
        self._time = asyncio.get_running_loop().time
        self._waited, self._moved = 0.0, 0

    async def wait(self, step: Awaitable[T]) -> T:
        """The step's result; `moved` says afterwards how many bytes it was."""
        started = self._time()
        async with asyncio.timeout(self._silence):
            result = await step
        self._waited += self._time() - started
        return result

    def moved(self, count: int) -> None:
        """Count bytes; at the end of each window, compare."""
        self._moved += count
        if self._waited >= self._silence:
            if self._moved < self._floor * self._waited:
                raise TimeoutError
            self._waited, self._moved = 0.0, 0
