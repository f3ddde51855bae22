"""A line as sites have it: narrow, far away, and gone every few seconds."""

import contextlib
import random
import select
import socket
import struct
import threading
import time
from dataclasses import dataclass, field


@dataclass
class BadLine:
    """A TCP proxy on loopback with a limited rate that cuts every connection after some bytes.

    `up` and `down` count what it took from the client and from the server. Half of the cuts are resets,
    which lose what is under way. The first `silent` ones are neither: nothing passes any more, and nobody is
    told. `whole` lets everything pass.
    """

    backend: tuple[str, int]
    rate: float  # bytes a second, each way
    every: int  # about so many bytes between two cuts
    latency: float = 0.01  # seconds, once a connection
    silent: int = 0
    seed: int = 1
    whole: bool = False
    up: int = 0
    down: int = 0
    cuts: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._draw = random.Random(self.seed)  # noqa: S311 - repeatable, and no secret
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = int(self._socket.getsockname()[1])
        self.base = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._accept, daemon=True, name="bad line").start()

    def close(self) -> None:
        self._socket.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._socket.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        time.sleep(self.latency)
        with contextlib.suppress(OSError), client:
            client.settimeout(60)
            # Small buffers, so that a cut loses no more than a real line holds.
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
            with socket.create_connection(self.backend, timeout=60) as server:
                server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**16)
                with self._lock:
                    lives, reset = self._draw.uniform(0.5, 1.5) * self.every, self._draw.random()
                line = _Line(client, server, lives, reset < 0.5)
                back = threading.Thread(target=self._pump, args=(line, False), daemon=True)
                back.start()
                self._pump(line, up=True)
                back.join()

    def _pump(self, line: "_Line", up: bool) -> None:
        source, sink = (line.client, line.server) if up else (line.server, line.client)
        free = (
            0.0  # when the line has sent what it took so far: a busy machine makes it no narrower
        )
        with contextlib.suppress(OSError):
            while data := source.recv(2**15):
                now = time.monotonic()
                free = max(free, now - 0.1) + len(data) / self.rate
                time.sleep(max(0.0, free - now))
                with self._lock:
                    self.up, self.down = (
                        self.up + len(data) * up,
                        self.down + len(data) * (not up),
                    )
                    line.passed += len(data)
                    if line.passed > line.lives and not self.whole:
                        if not line.cut:
                            line.silent = self.cuts < self.silent
                            self.cuts += 1
                        line.cut = True
                if line.cut:
                    break
                sink.sendall(data)
        if line.cut and line.silent:
            line.outwait()
        line.end()


@dataclass
class _Line:
    client: socket.socket
    server: socket.socket
    lives: float
    reset: bool
    passed: int = 0
    cut: bool = False
    silent: bool = False

    def outwait(self) -> None:
        """Until the client has given up."""
        gone = select.poll()
        with contextlib.suppress(OSError, ValueError):  # it is closed already
            gone.register(self.client, select.POLLRDHUP)
            gone.poll(300_000)

    def end(self) -> None:
        """Close both ways; a reset does not wait for what was sent."""
        for end in (self.client, self.server):
            with contextlib.suppress(OSError):
                if self.cut and self.reset:
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                end.shutdown(socket.SHUT_RDWR)
                if self.cut:
                    end.close()
