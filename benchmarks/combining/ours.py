"""Our side: the engine on files, and plain torch additions in memory. `serve.py` says how it is asked."""

import sys
import time
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from benchmarks.combining.inputs import Level, updates
from benchmarks.combining.serve import Answer, serve, timed
from fl_server_ai.aggregation import STRATEGIES, UpdateMeta, compiled
from fl_server_ai.aggregation.blocks import Draft
from fl_server_ai.aggregation.engine import UpdateFile, aggregate

THREADS = 2


def combine(folder: str, n: int, rule: str) -> Answer:
    """Seconds of the whole call, `end` of them for digest, fsync and rename; `extra` bytes."""
    ends: list[float] = []
    publish = Draft.publish

    def publish_timed(self: Draft) -> str:
        start = time.perf_counter()
        try:
            return publish(self)
        finally:
            ends.append(time.perf_counter() - start)

    place = Path(folder)
    given = [
        UpdateFile(path, UpdateMeta(f"{index:04}", 100 + index))
        for index, path in enumerate(updates(place, n))
    ]
    level = Level()
    with mock.patch.object(Draft, "publish", publish_timed):
        _, figures = timed(
            lambda: aggregate(
                base=place / "base",
                updates=given,
                out=place / "out",
                state_out=place / "state",
                strategy=STRATEGIES[rule](),
                device="cpu",
                threads=THREADS,
            )
        )
    return figures | {"end": ends[0], "extra": level.extra()}


def axpy(n: int, p: int, threads: int) -> Answer:
    """n in-place additions of p float32 that are in memory already: nothing is read or written."""
    torch.set_num_threads(threads)
    total, inputs = torch.zeros(p), [torch.ones(p) for _ in range(4)]

    def work() -> None:
        for index in range(n):
            total.add_(inputs[index % 4], alpha=0.1)

    work()
    return timed(work)[1]


def main() -> None:
    torch.ones(200_000).add_(torch.ones(200_000), alpha=2)
    compiled.prepare(compiled.WORTH)  # a process does this once
    serve({"combine": combine, "axpy": axpy})


if __name__ == "__main__":
    main()
