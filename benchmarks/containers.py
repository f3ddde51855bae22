"""Torch archives in and out: seconds beside a copy of the same file, and the memory that it takes.

python benchmarks/containers.py --megabytes 400
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from fl_server_ai.containers import extract, write_back  # noqa: E402


def make_files(folder: Path, megabytes: int) -> None:
    """The same module as a state dict and as a script; in a child, so that torch costs no memory here."""
    import torch

    width = 1000
    module = torch.nn.Sequential(
        *(torch.nn.Linear(width, width) for _ in range(megabytes * 10**6 // (4 * width * width)))
    )
    torch.save(module.state_dict(), folder / "torch.save")
    with warnings.catch_warnings(action="ignore"):
        torch.jit.script(module).save(str(folder / "TorchScript"))


def in_child(work: Callable[[], None]) -> None:
    """Run it in a forked child and wait."""
    pid = os.fork()
    if pid == 0:
        work()
        os._exit(0)
    if os.waitpid(pid, 0)[1]:
        raise RuntimeError("the child failed")


def seconds(work: Callable[[], None], *made: Path) -> float:
    """How long it takes; what it made is deleted before, outside the time."""
    for path in made:
        path.unlink(missing_ok=True)
    os.sync()  # what others have still to write would be waited for as well
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def copy_and_sync(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    with target.open("rb+") as handle:
        os.fsync(handle.fileno())


def anonymous_and_mapped() -> int:
    """Peak resident bytes of this process since the last reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM")


def measure(name: str, folder: Path, repeat: int) -> list[str]:
    """A row of the table: medians of paired runs."""
    source, copy = folder / name, folder / "copy"
    canonical, back = folder / "canonical", folder / "back"
    container = {"torch.save": "torch", "TorchScript": "torchscript"}[name]
    times: dict[str, list[float]] = {"copy": [], "synced": [], "in": [], "out": []}
    Path("/proc/self/clear_refs").write_text("5")  # reset the high-water mark
    before = anonymous_and_mapped()
    for _ in range(repeat):
        times["copy"].append(seconds(lambda: shutil.copyfile(source, copy) and None, copy))
        times["synced"].append(seconds(lambda: copy_and_sync(source, copy), copy))
        times["in"].append(seconds(lambda: extract(source, canonical) and None, canonical))
        times["out"].append(seconds(lambda: write_back(container, canonical, back, source), back))
    growth = anonymous_and_mapped() - before
    medians = {key: statistics.median(values) for key, values in times.items()}
    return [
        name,
        *(f"{medians[key]:.2f}" for key in times),
        f"{medians['in'] / medians['synced']:.2f}",
        f"{medians['out'] / medians['copy']:.2f}",
        f"{growth / 1e6:.0f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--repeat", type=int, default=7)
    options = parser.parse_args()
    table = Table(title=f"Files of {options.megabytes} MB, seconds")
    for column in (
        "container", "copy", "copy + fsync", "extract (digest, CRC, fsync)", "write back",
        "extract / copy + fsync", "write back / copy", "RSS growth MB",
    ):  # fmt: skip
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory(prefix="flb-") as name:
        folder = Path(name)
        in_child(lambda: make_files(folder, options.megabytes))
        for container in ("TorchScript", "torch.save"):
            table.add_row(*measure(container, folder, options.repeat))
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
