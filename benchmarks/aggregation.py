"""How fast updates are combined, beside plain torch on the same machine, and how much memory it takes.

    python benchmarks/aggregation.py [--n 10 100] [--p 10000000] [--repeat 7] [--threads 2] [--strategy Krum]

Any strategy, with its default options, in place of FedAvg. Makes N distinct files of P float32 parameters in a temporary folder (4 GB for 100 x 10M), reads them warm
from the page cache and deletes them. Every figure is a median; the parts of the whole are timed in the same calls.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fl_server_ai.aggregation import STRATEGIES, UpdateMeta
from fl_server_ai.aggregation.blocks import Draft
from fl_server_ai.aggregation.engine import UpdateFile, aggregate

MB = 1e6


def make_files(folder: Path, n: int, p: int) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [p], "data_offsets": [0, 4 * p]}}).encode()
    header += b" " * (-len(header) % 8)
    generator = np.random.default_rng(0)
    for index in range(n):
        with (folder / f"{index}").open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.write(generator.standard_normal(p, dtype=np.float32).data)


def one_run(folder: Path, n: int, threads: int | None, name: str) -> tuple[float, float]:
    """Seconds of the whole call, and of its end: digest, fsync and rename."""
    ends: list[float] = []
    publish = Draft.publish

    def timed(self: Draft) -> str:
        start = time.perf_counter()
        try:
            return publish(self)
        finally:
            ends.append(time.perf_counter() - start)

    updates = [UpdateFile(folder / f"{k}", UpdateMeta(f"{k:04}", 100 + k)) for k in range(n)]
    with mock.patch.object(Draft, "publish", timed):
        start = time.perf_counter()
        aggregate(
            base=folder / "0",
            updates=updates,
            out=folder / "out",
            state_out=folder / "state",
            strategy=STRATEGIES[name](),
            device="cpu",
            threads=threads,
        )
        return time.perf_counter() - start, ends[0]


def axpy(n: int, p: int, threads: int) -> float:
    """Seconds of n in-place additions of p float32, inputs and output resident: no reading, no file."""
    torch.set_num_threads(threads)
    total, inputs = torch.zeros(p), [torch.randn(p) for _ in range(4)]
    start = time.perf_counter()
    for index in range(n):
        total.add_(inputs[index % 4], alpha=0.1)
    return time.perf_counter() - start


def status(field: str) -> float:
    """A field of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith(field))


def extra_memory(folder: Path, n: int, threads: int | None, name: str) -> float:
    """Peak minus the level before, in a fresh process that has torch loaded and warm."""
    command = [sys.executable, __file__, "--child", str(folder), "--n", str(n), "--strategy", name]
    command += ["--threads", str(threads)] if threads else []
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def child(folder: Path, n: int, threads: int | None, name: str) -> None:
    torch.ones(200_000).add_(torch.ones(200_000), alpha=2)
    before = status("VmRSS")
    one_run(folder, n, threads, name)
    print(status("VmHWM") - before)


def rounds(n: int, p: int, repeat: int, threads: int | None, name: str) -> list[Any]:
    with tempfile.TemporaryDirectory(prefix="fl-bench-") as temporary:
        folder = Path(temporary)
        make_files(folder, n, p)
        os.sync()  # or the write-back of the inputs is measured
        one_run(folder, n, threads, name)
        axpy(n, p, 1)
        runs, plain, plain_one = [], [], []
        for _ in range(repeat):
            runs.append(one_run(folder, n, threads, name))
            plain.append(axpy(n, p, len(os.sched_getaffinity(0))))
            plain_one.append(axpy(n, p, 1))
        whole = statistics.median(run[0] for run in runs)
        end = statistics.median(run[1] for run in runs)
        fold = statistics.median(run[0] - run[1] for run in runs)
        gigabytes = 4 * n * p / 1e9
        return [
            f"{n} x {p / 1e6:g}M",
            f"{fold * 1e3:.0f}",
            f"{end * 1e3:.0f}",
            f"{whole * 1e3:.0f}",
            f"{min(run[0] for run in runs) * 1e3:.0f}",
            f"{gigabytes / fold:.1f}",
            f"{gigabytes / statistics.median(plain):.1f}",
            f"{gigabytes / statistics.median(plain_one):.1f}",
            f"{fold / statistics.median(plain):.2f}",
            f"{extra_memory(folder, n, threads, name) / MB:.0f}",
            f"{(1.5 * 4 * p) / MB + 100:.0f}",
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--p", type=int, default=10_000_000)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--strategy", default="FedAvg")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(given.child, given.n[0], given.threads, given.strategy)
        return
    table = Table(title=f"{given.strategy} of float32 files, CPU, medians (ms, GB/s of input, MB)")
    columns = "updates|fold|digest + fsync|whole|best whole|fold GB/s|axpy all cores GB/s"
    columns += "|axpy 1 thread GB/s|fold time / axpy time|extra RSS|RSS goal"
    for column in columns.split("|"):
        table.add_column(column, justify="right")
    for n in given.n:
        table.add_row(*rounds(n, given.p, given.repeat, given.threads, given.strategy))
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
