"""The worker's end of a child's pipes: frames with a deadline, and no trust in what comes back."""

import os
import select
import time
from collections.abc import Sequence
from typing import IO, Any

from fl_server_ai.sandbox import frames
from fl_server_ai.sandbox.tensors import RawTensor

PIECE = 2**20


class Late(Exception):
    """The deadline has passed."""


class Gone(Exception):
    """The child's end of a pipe is closed."""


class Channel:
    """Deadlines are on the monotonic clock. Whatever comes is a checked frame, or a `BadFrame`."""

    def __init__(self, to_child: IO[bytes], from_child: IO[bytes]) -> None:
        self._to, self._from = to_child, from_child
        for pipe in (to_child, from_child):
            os.set_blocking(pipe.fileno(), False)
        self._writable, self._readable = select.poll(), select.poll()
        self._writable.register(to_child, select.POLLOUT)
        self._readable.register(from_child, select.POLLIN)

    def send(self, header: dict[str, Any], tensors: Sequence[RawTensor], deadline: float) -> None:
        """One frame, written as fast as the child reads it."""
        described = [[t.name, t.dtype, list(t.shape)] for t in tensors]
        size = sum(t.nbytes for t in tensors)
        self._write(frames.packed_header({**header, "tensors": described}, size), deadline)
        for tensor in tensors:
            if tensor.nbytes:
                self._write(tensor.data, deadline)

    def receive(self, deadline: float, most: int = 0) -> tuple[dict[str, Any], list[RawTensor]]:
        """The next frame. Bodies of more than `most` bytes are `TooMuch`, before any of it is read."""
        header_size, body = frames.LENGTHS.unpack(self._read(frames.LENGTHS.size, deadline))
        if header_size > frames.ANSWER_HEADER:
            raise frames.BadFrame("the header is too long")
        header = frames.parsed_header(self._read(header_size, deadline))
        described = frames.described(header, body)
        if body > most:
            raise TooMuch(body)
        tensors = [
            RawTensor(dtype, shape, bytes(self._read(size, deadline)), name)
            for name, dtype, shape, size in described
        ]
        return header, tensors

    @property
    def speaks(self) -> bool:
        """Whether something is there to be read, the end of the pipe included."""
        return bool(self._readable.poll(0))

    def close(self) -> None:
        self._to.close()
        self._from.close()

    def _write(self, data: bytes | bytearray | memoryview, deadline: float) -> None:
        left = memoryview(data).cast("B")
        while left:
            _wait(self._writable, deadline)
            try:
                left = left[os.write(self._to.fileno(), left[:PIECE]) :]
            except BlockingIOError:
                continue
            except OSError as error:
                raise Gone from error

    def _read(self, size: int, deadline: float) -> bytearray:
        buffer = bytearray(size)
        left = memoryview(buffer)
        while left:
            _wait(self._readable, deadline)
            try:
                count = os.readv(self._from.fileno(), [left])
            except BlockingIOError:
                continue
            if not count:
                raise Gone
            left = left[count:]
        return buffer


class TooMuch(Exception):
    """The child wants to say more than it may."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.size = size


def _wait(poll: select.poll, deadline: float) -> None:
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            raise Late
        if poll.poll(min(left, 1.0) * 1000 + 1):
            return
