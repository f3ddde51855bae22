"""Memory depends on the size of a block, never on the number of updates."""

import json
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

PARAMETERS = 1_000_000

# torch is loaded once; each job has a process of its own, whose peak begins with what it was given.
MEASURE = """
import json
import os
import sys
from pathlib import Path
from fl_server_ai.aggregation import STRATEGIES, UpdateMeta
from fl_server_ai.aggregation.engine import UpdateFile, aggregate

folder = Path(sys.argv[1])

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

def run(job, n):
    beside = folder / "beside" if job["name"] == "SCAFFOLD" else None
    mask = folder / "mask" if job["name"] == "FedAvgM" else None
    updates = [
        UpdateFile(folder / str(k), UpdateMeta(str(k), k + 1), extras=beside, mask=mask)
        for k in range(n)
    ]
    kind = STRATEGIES[job["name"]]
    aggregate(
        base=folder / "0", updates=updates, out=folder / "out", device="cpu",
        strategy=kind(kind.Options(**job["options"])), threads=job["threads"],
    )

for job in json.loads(sys.argv[2]):
    child = os.fork()
    if child == 0:
        run(job, job["few"])
        before = peak()
        run(job, job["many"])
        print(json.dumps([job["name"], peak() - before]), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


@dataclass
class Job:
    """Two rounds with so many updates, `few` first."""

    name: str
    threads: int = 2
    options: dict[str, Any] = field(default_factory=dict)
    few: int = 3
    many: int = 40


# Megabytes that the buffers of two threads may take; the other 37 updates would be 148 MB.
LIMITS = {
    "FedAvg": 8,
    "FedAdam": 40,
    "FedMedian": 90,
    "TrimmedMean": 110,
    "Krum": 40,
    "GeometricMedian": 40,
    "AdaptiveZeroing": 40,
    "SCAFFOLD": 40,  # with control variates beside the updates
    "FedAvgM": 40,  # with masks
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    folder = tmp_path_factory.mktemp("updates")
    for index in range(40):
        save_file({"w": torch.full((PARAMETERS,), float(index))}, folder / str(index))
    save_file({"scaffold.dc.0": torch.ones(PARAMETERS)}, folder / "beside")
    save_file({"mask.0": torch.ones(PARAMETERS, dtype=torch.uint8)}, folder / "mask")

    return grown(folder, [Job(name) for name in LIMITS])


@pytest.mark.parametrize("name", LIMITS)
def test_forty_updates_need_no_more_memory_than_three(measured: dict[str, int], name: str) -> None:
    assert measured[name] < LIMITS[name] * 1_000_000


def grown(folder: Path, jobs: Iterable[Job]) -> dict[str, int]:
    """By how many bytes the peak of a process is higher after the larger round than after the smaller one."""
    given = json.dumps([asdict(job) for job in jobs])
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder), given],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return dict(json.loads(line) for line in done.stdout.splitlines())


@pytest.mark.heavy
def test_many_threads_share_one_budget_of_memory(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(4)
    for index in range(100):
        path = tmp_path / str(index)
        if index < 9:
            save_file({"w": torch.randn(PARAMETERS, generator=generator)}, path)
        else:
            path.hardlink_to(tmp_path / str(index % 9))

    # The rows of four threads are 20 MB; Bulyan, which trims what it has chosen, takes a few times that.
    jobs = [Job("Bulyan", threads=4, options={"f": 1}, few=7, many=100)]
    assert grown(tmp_path, jobs)["Bulyan"] < 250_000_000
