"""The child's end of the two pipes, and how it says no."""

import os
from typing import Any

from fl_server_ai.sandbox import frames


class Refusal(Exception):
    """A failure with its code; `errors.py` has the ones that the worker knows."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


class Pipes:
    """Frames from and to the worker. The end of the one is the end of this process."""

    def __init__(self) -> None:
        self._in, self._out = os.dup(0), os.dup(1)
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        self._null = null

    def silence(self) -> None:
        """No word to the worker's log from here on."""
        os.dup2(self._null, 2)

    @property
    def kept(self) -> list[int]:
        return [0, 1, 2, self._in, self._out, self._null]

    def receive(self) -> tuple[dict[str, Any], list[tuple[str, str, tuple[int, ...], bytearray]]]:
        """The next request: its header, and name, dtype, shape and bytes of its tensors."""
        header_size, body = frames.LENGTHS.unpack(self._exactly(frames.LENGTHS.size))
        header = frames.parsed_header(self._exactly(header_size))
        tensors = frames.described(header, body)
        return header, [(n, dtype, shape, self._exactly(size)) for n, dtype, shape, size in tensors]

    def send(self, header: dict[str, Any], body: memoryview | None = None) -> None:
        """An answer, with the bytes of the one tensor that it may have."""
        size = body.nbytes if body is not None else 0
        self._write(frames.packed_header(header, size))
        if body is not None:
            self._write(body)

    def _exactly(self, size: int) -> bytearray:
        buffer = bytearray(size)
        view = memoryview(buffer)
        while view:
            count = os.readv(self._in, [view])
            if not count:
                os._exit(0)  # the worker is gone
            view = view[count:]
        return buffer

    def _write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._out, view) :]
