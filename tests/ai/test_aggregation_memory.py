"""Memory depends on the size of a block, never on the number of updates."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

PARAMETERS = 1_000_000

MEASURE = """
import json
import sys
from pathlib import Path
from fl_server_ai.aggregation import STRATEGIES, UpdateMeta
from fl_server_ai.aggregation.engine import UpdateFile, aggregate

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

def run(n):
    out = Path(sys.argv[1]) / "out"
    beside = Path(sys.argv[1]) / "beside" if sys.argv[2] == "SCAFFOLD" else None
    mask = Path(sys.argv[1]) / "mask" if sys.argv[2] == "FedAvgM" else None
    updates = [
        UpdateFile(
            Path(sys.argv[1]) / str(k), UpdateMeta(str(k), k + 1), extras=beside, mask=mask
        )
        for k in range(n)
    ]
    base = Path(sys.argv[1]) / "0"
    kind = STRATEGIES[sys.argv[2]]
    strategy = kind(kind.Options(**json.loads(sys.argv[4])))
    threads = int(sys.argv[3])
    aggregate(base=base, updates=updates, out=out, strategy=strategy, device="cpu", threads=threads)

run(int(sys.argv[5]))
before = peak()
run(int(sys.argv[6]))
print(peak() - before)
"""


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


@pytest.mark.parametrize("name", LIMITS)
def test_forty_updates_need_no_more_memory_than_three(tmp_path: Path, name: str) -> None:
    for index in range(40):
        save_file({"w": torch.full((PARAMETERS,), float(index))}, tmp_path / str(index))

    save_file({"scaffold.dc.0": torch.ones(PARAMETERS)}, tmp_path / "beside")
    save_file({"mask.0": torch.ones(PARAMETERS, dtype=torch.uint8)}, tmp_path / "mask")

    assert grown(tmp_path, name) < LIMITS[name] * 1_000_000


def grown(
    folder: Path, name: str, threads: int = 2, options: str = "{}", few: int = 3, many: int = 40
) -> int:
    """By how many bytes the peak of a process is higher after the larger round than after the smaller one."""
    given = [str(folder), name, str(threads), options, str(few), str(many)]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *given], check=True, capture_output=True, text=True
    )
    return int(done.stdout)


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
    assert grown(tmp_path, "Bulyan", 4, '{"f": 1}', 7, 100) < 250_000_000
