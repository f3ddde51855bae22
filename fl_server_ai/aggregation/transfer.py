"""The way of blocks to a device that works beside the host: read, copied and worked on at the same time.

Two lanes take turns. While the device works on the block of one, the other's host buffer, which the device can read by
itself (pinned), is filled from the next file and copied on a stream of its own. Marks keep them apart: a host buffer is filled
again when its copy has ended, a device buffer when what was worked out from it has. Memory belongs to the stream on which it
was made, so what is calculated with is made there too. tests/ai/test_aggregation_transfer.py runs every strategy on a
simulated GPU that notices what these rules leave out.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from fl_server_ai.aggregation.blocks import FLOATS, Run, Source

Mark = Any  # a point in what a device has been told to do


class Queue(Protocol):
    """What a device is told to do, in order: one stream that copies, and one that calculates."""

    def calculating(self) -> AbstractContextManager[object]:
        """Operations in the block go to the stream that calculates."""

    def host(self, nbytes: int) -> Tensor:
        """Host memory that copies may read by themselves."""

    def room(self, nbytes: int) -> Tensor:
        """Device memory, uint8."""

    def copy(self, target: Tensor, source: Tensor, after: Mark) -> Mark:
        """Copy from the host once `after` is reached. What is calculated from now on waits for it."""

    def mark(self) -> Mark:
        """Reached when everything that was to be calculated so far is."""

    def wait(self, mark: Mark) -> None:
        """Hold the host until then."""


class CudaQueue:
    """Two streams of a GPU, for one thread."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._work: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def calculating(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._work)

    def host(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def room(self, nbytes: int) -> Tensor:
        with self.calculating():
            room = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        room.record_stream(self._copies)  # not given to others before its last copy is over
        return room

    def copy(self, target: Tensor, source: Tensor, after: Mark) -> Mark:
        self._copies.wait_event(after)
        with torch.cuda.stream(self._copies):
            target.copy_(source, non_blocking=True)
        copied = self._mark(self._copies)
        self._work.wait_event(copied)
        return copied

    def mark(self) -> Mark:
        return self._mark(self._work)

    def _mark(self, stream: Any) -> Mark:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(stream)
        return event

    def wait(self, mark: Mark) -> None:
        mark.synchronize()


def queue_of(device: torch.device) -> Queue | None:
    """None for the CPU: it works on what was read, where it was read to."""
    return CudaQueue(device) if device.type == "cuda" else None


class Slot:
    """One reused host buffer, read into and worked on in place."""

    def __init__(
        self,
        nbytes: int,
        host: Callable[[int], Tensor] = lambda n: torch.empty(n, dtype=torch.uint8),
    ) -> None:
        self._bytes = host(nbytes)
        self._views: dict[tuple[str, int], tuple[Tensor, memoryview]] = {}

    def view(self, run: Run, count: int) -> tuple[Tensor, memoryview]:
        """The buffer's beginning as `count` numbers of the run's dtype, and as bytes."""
        key = run.dtype, count
        if key not in self._views:  # making them anew for each read takes a tenth of the whole time
            part = self._bytes[: count * run.itemsize]
            self._views[key] = part.view(FLOATS[run.dtype]), part.numpy().data
        return self._views[key]

    def load(self, source: Source, run: Run, start: int, count: int) -> Tensor:
        """Numbers `start` to `start + count` of the run, on the device; valid until `used`."""
        block, data = self.view(run, count)
        source.read_into(data, run.offset + start * run.itemsize)
        return block

    def used(self) -> None:
        """Whoever asked for the block has told the device everything that is to be done with it."""


class Lane(Slot):
    """One of two host buffers with its place on the device."""

    def __init__(self, nbytes: int, queue: Queue) -> None:
        super().__init__(nbytes, queue.host)
        self._queue = queue
        self._room = queue.room(nbytes)
        self._copied: Mark | None = None
        self._used = queue.mark()  # whoever had that place before may still be at work

    def load(self, source: Source, run: Run, start: int, count: int) -> Tensor:
        if self._copied is not None:
            self._queue.wait(self._copied)
        block = super().load(source, run, start, count)
        there = self._room[: count * run.itemsize].view(block.dtype)
        self._copied = self._queue.copy(there, block, self._used)
        return there

    def used(self) -> None:
        self._used = self._queue.mark()
