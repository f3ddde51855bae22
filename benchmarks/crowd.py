"""Hundreds of clients in one process without threads: they long-poll, and whoever is asked takes part. Run by `waiting.py`.

Reads a JSON job from standard input and writes JSON lines to standard output: {"connected": n} once everybody has
asked, {"round": r, "task": id, "site": n} when the first client hears of a round, {"closed": r} when its last
update has been acknowledged, and a summary at the end.
"""

import asyncio
import hashlib
import json
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

BOUNDARY = "fl-benchmark"
PATIENCE = 120.0  # seconds for one answer; a held poll takes 25
KEPT = 75.0  # seconds that the server keeps a connection on which nothing happens
NEARLY = 5.0  # seconds; a connection that rested so much less may have been ended for it
ACCEPT = "application/vnd.safetensors, application/json"


def tell(**line: Any) -> None:
    print(json.dumps(line), flush=True)


class Hung(Exception):
    """A connection ended before the head of an answer came."""


class Wire:
    """One HTTP/1.1 connection that is kept, and made again where the server may have closed it: it had rested for long."""

    def __init__(self, url: str, token: str) -> None:
        self.at = urlsplit(url)
        self.head = (
            f"Host: {self.at.netloc}\r\nAuthorization: Token {token}\r\nAccept: {ACCEPT}\r\n"
            "X-Forwarded-Proto: https\r\n"
        )
        self.reader: asyncio.StreamReader | None = None
        self.writer: asyncio.StreamWriter | None = None
        self.made = 0
        self.rests_since = 0.0

    async def ask(
        self, method: str, path: str, body: bytes = b"", kind: str = ""
    ) -> tuple[int, bytes]:
        """Status and body. Raises OSError, EOFError or TimeoutError if none comes.

        A request that got no answer is lost, and is not sent again here: the server may have closed
        a connection only between requests, and only one that had rested for about as long as it keeps them.
        """
        rested = time.monotonic() - self.rests_since
        try:
            if self.writer is not None and rested > KEPT - NEARLY:
                try:
                    return await self._once(method, path, body, kind)
                except Hung:
                    self.close()
            return await self._once(method, path, body, kind)
        except Hung as error:
            raise ConnectionError("closed without an answer") from error

    async def _once(self, method: str, path: str, body: bytes, kind: str) -> tuple[int, bytes]:
        async with asyncio.timeout(PATIENCE):
            if self.writer is None:
                self.reader, self.writer = await asyncio.open_connection(
                    self.at.hostname, self.at.port
                )
                self.made += 1
            assert self.reader is not None
            head = f"{method} {path} HTTP/1.1\r\n{self.head}Content-Length: {len(body)}\r\n"
            head += f"Content-Type: {kind}\r\n" if kind else ""
            try:
                self.writer.write(f"{head}\r\n".encode() + body)
                await self.writer.drain()
                top = await self.reader.readuntil(b"\r\n\r\n")
            except (ConnectionError, asyncio.IncompleteReadError) as error:
                raise Hung from error
            return await self._body(self.reader, top.decode("latin-1"))

    async def _body(self, reader: asyncio.StreamReader, top: str) -> tuple[int, bytes]:
        first, *lines = top.rstrip().split("\r\n")
        headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
        if headers.get("transfer-encoding", "").lower() == "chunked":
            parts = []
            while size := int(await reader.readline(), 16):
                parts.append(await reader.readexactly(size))
                await reader.readline()
            await reader.readline()
            body = b"".join(parts)
        else:
            body = await reader.readexactly(int(headers.get("content-length", "0")))
        self.rests_since = time.monotonic()
        if headers.get("connection", "").lower() == "close":
            self.close()
        return int(first.split()[1]), body

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
        self.reader = self.writer = None


class Crowd:
    """All clients, and what they saw."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.url, self.file = job["url"], Path(job["file"]).read_bytes()
        self.tokens: list[str] = job["tokens"]
        self.goal: int = job["sample"]
        self.errors: Counter[str] = Counter()
        # round -> when each of those who are asked in it first heard so, by client
        self.known: dict[int, dict[int, float]] = defaultdict(dict)
        # when each client, asked or not, heard that the training is over
        self.over: list[float] = []
        self.sent: dict[int, list[float]] = defaultdict(list)  # round -> when updates were received
        self.seconds: dict[str, list[float]] = defaultdict(list)  # what -> how long it took
        self.asked = 0
        self.reconnects = 0

    async def run(self) -> None:
        await asyncio.gather(*(self._client(n, token) for n, token in enumerate(self.tokens)))
        last = {number: max(times) for number, times in self.sent.items()}
        knowing = {
            number: [at - last[number - 1] for at in times.values()]
            for number, times in self.known.items()
            if number - 1 in last
        }
        end = max(last.values(), default=0.0)
        tell(
            errors=dict(self.errors),
            closed_at=last,
            opened_at={number: min(times.values()) for number, times in self.known.items()},
            updates={number: len(times) for number, times in self.sent.items()},
            asked={number: len(times) for number, times in self.known.items()},
            knowing=knowing,
            over=[at - end for at in self.over],
            seconds=self.seconds,
            reconnects=self.reconnects,
        )

    async def _client(self, number: int, token: str) -> None:
        await asyncio.sleep(number * 0.005)
        wire = Wire(self.url, token)
        first = True
        while True:
            began = time.monotonic()
            poll = asyncio.ensure_future(self._call(wire, "GET", "/api/tasks/?wait=25"))
            if first:
                self.asked += 1
                if self.asked == len(self.tokens):
                    tell(connected=self.asked)
                first = False
            answer = json.loads(await poll or "null")
            if answer is None:
                await asyncio.sleep(1.0)
            elif answer["state"] == "done":
                self.over.append(time.monotonic())
                break
            elif answer["state"] == "task":
                await self._take_part(wire, number, answer["task"])
            else:  # as fl_client does: a server that has held the question has done the waiting
                held = time.monotonic() - began
                await asyncio.sleep(max(0.0, answer["retry_after"] - held))
        self.reconnects += wire.made - 1
        wire.close()

    async def _take_part(self, wire: Wire, number: int, task: dict[str, Any]) -> None:
        at = task["round"]
        if not self.known[at]:
            tell(round=at, task=task["id"], site=number)
        self.known[at].setdefault(number, time.monotonic())
        weights = await self._call(wire, "GET", task["model"]["url"], what="download")
        if weights and hashlib.sha256(weights).hexdigest() != task["model"]["sha256"]:
            self.errors["download: wrong digest"] += 1
        form = {"round": at, "sample_size": 10 + number}
        kind = f"multipart/form-data; boundary={BOUNDARY}"
        if await self._call(
            wire, "POST", task["upload_url"], self._multipart(form), kind, "upload"
        ):
            self.sent[at].append(time.monotonic())
            if len(self.sent[at]) == self.goal:
                tell(closed=at)

    def _multipart(self, fields: dict[str, int]) -> bytes:
        head = "".join(
            f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
            for name, value in fields.items()
        )
        head += (
            f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="model_file"; filename="m"\r\n'
            "Content-Type: application/octet-stream\r\n\r\n"
        )
        return head.encode() + self.file + f"\r\n--{BOUNDARY}--\r\n".encode()

    async def _call(
        self,
        wire: Wire,
        method: str,
        path: str,
        body: bytes = b"",
        kind: str = "",
        what: str = "poll",
    ) -> bytes:
        """The body of a good answer; nothing, and an error that is counted, otherwise."""
        began = time.monotonic()
        try:
            status, answer = await wire.ask(method, path, body, kind)
        except (OSError, EOFError, TimeoutError, ValueError) as error:
            wire.close()
            self.errors[f"{what}: {type(error).__name__} {error}"[:200]] += 1
            return b""
        if status not in {200, 201}:
            self.errors[f"{what}: {status} {answer[:200].decode(errors='replace')}"] += 1
            return b""
        if what != "poll":
            self.seconds[what].append(time.monotonic() - began)
        return answer


def main() -> None:
    asyncio.run(Crowd(json.loads(sys.stdin.readline())).run())


if __name__ == "__main__":
    main()
