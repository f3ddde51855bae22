"""The load test itself: what it makes of its samples, and a small run on a production server."""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.crowd import KEPT, Crowd, Wire
from benchmarks.waiting import broken
from benchmarks.watch import Sample, Watch
from fl_server.front.serving import KEEP_SECONDS
from tests.system.processes import ROOT, environment

pytestmark = pytest.mark.system


def test_growth_is_that_of_a_fitted_line_after_the_first_rounds() -> None:
    watch = Watch({"web": os.getpid()}, None)
    for number in range(200):
        size = {"web 1": 100_000_000, "worker 2": 100_000_000 + 50_000 * max(0, number - 20)}
        warm = {name: value // 2 if number < 20 else value for name, value in size.items()}
        watch.samples.append(Sample(float(number), number, None, 0, 0, [], warm))

    grown = watch.drift(20)

    assert grown["web 1"] == pytest.approx(0.0, abs=1e-6)
    assert grown["worker 2"] == pytest.approx(100 * 179 * 50_000 / 100_000_000)


def test_a_process_that_was_replaced_is_counted_and_breaks_a_bound() -> None:
    watch = Watch({"web": os.getpid()}, None)
    for number in range(40):
        worker = "worker 2" if number < 30 else "worker 3"
        late = {} if number < 10 else {"inference 4": 1_000}
        rss = {"web 1": 1_000, worker: 1_000, **late}
        watch.samples.append(Sample(float(number), number, None, 0, 0, [], rss))

    seen = watch.turnover()

    assert seen == {
        "inference": {"ended": 0, "joined": 1},
        "web": {"ended": 0, "joined": 0},
        "worker": {"ended": 1, "joined": 1},
    }
    assert broken(found(turnover=seen)) == ["processes that ended: 1, must be below 1"]
    assert Watch({"web": os.getpid()}, None).turnover() == {}


def found(**others: Any) -> dict[str, Any]:
    usual = {
        "rounds": 200,
        "errors": {},
        "turnover": {"web": {"ended": 0, "joined": 2}},
        "connections": {"waiting": 3, "rounds": {"max": 29.0}},
        "web": {"waiting rss": 399_000_000, "rounds rss": 100},
        "drift": {"since": 20, "percent": {"web 1": 4.9, "worker 2": -7.0}},
    }
    return {**usual, **others}


@pytest.mark.parametrize(
    ("others", "names"),
    [
        ({}, []),
        ({"errors": {"poll: 503": 1}}, ["errors"]),
        ({"connections": {"waiting": 30, "rounds": {}}}, ["connections"]),
        ({"connections": {"waiting": 3, "rounds": {"max": 30.0}}}, ["connections"]),
        ({"web": {"waiting rss": 100, "rounds rss": 400_000_000}}, ["web MB"]),
        ({"drift": {"since": 20, "percent": {"web 1": 5.0}}}, ["drift %"]),
        ({"rounds": 50, "drift": {"since": 12, "percent": {"web 1": 50.0}}}, []),
    ],
)
def test_every_bound_that_is_broken_is_named(others: dict[str, Any], names: list[str]) -> None:
    assert [said.partition(":")[0] for said in broken(found(**others))] == names


ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nnull"


@pytest.mark.parametrize(
    ("rested", "sent", "errors"),
    [
        (0.0, 2, {"poll: ConnectionError closed without an answer": 1}),
        (KEPT - 20.0, 2, {"poll: ConnectionError closed without an answer": 1}),
        (KEPT, 3, {}),
    ],
)
def test_a_request_without_an_answer_is_an_error_unless_its_connection_had_rested_for_long(
    tmp_path: Path, rested: float, sent: int, errors: dict[str, int]
) -> None:
    """A server that answers the first request of its first connection and hangs up at the second one."""
    (tmp_path / "model").write_bytes(b"")
    crowd = Crowd({"url": "", "file": tmp_path / "model", "tokens": [], "sample": 1})
    requests: list[int] = []

    async def served(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        requests.append(1)
        writer.write(ANSWER)
        if len(requests) == 1:
            await reader.readuntil(b"\r\n\r\n")
            requests.append(2)
        writer.close()

    async def asking() -> list[bytes]:
        async with await asyncio.start_server(served, "127.0.0.1", 0) as server:
            wire = Wire(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", "token")
            first = await crowd._call(wire, "GET", "/")
            wire.rests_since -= rested
            second = await crowd._call(wire, "GET", "/")
            wire.close()
            return [first, second]

    answers = asyncio.run(asking())

    assert answers == [b"null", b"" if errors else b"null"]
    assert dict(crowd.errors) == errors
    assert len(requests) == sent


def test_the_clients_know_how_long_the_server_keeps_a_connection() -> None:
    assert KEPT == KEEP_SECONDS


@pytest.mark.heavy
def test_sixty_clients_wait_and_twelve_a_round_take_part_without_an_error(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/waiting.py", "--server", "production"]
    size = ["--clients", "60", "--sample", "12", "--rounds", "5", "--idle", "3"]

    done = subprocess.run(
        [*command, *size, "--results", str(tmp_path)],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stdout + done.stderr
    measured = json.loads((tmp_path / "waiting-production.json").read_text())
    assert measured["errors"] == {}
    assert measured["all who are asked next know"]["count"] == 4
    assert measured["one who is asked next knows"]["count"] == 4 * 12
    assert measured["a client knows of the end"]["count"] == 60
