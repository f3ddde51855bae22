"""Memory depends on the size of a block, never on the number of updates."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

PARAMETERS = 1_000_000

MEASURE = """
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
    strategy = STRATEGIES[sys.argv[2]]()
    aggregate(base=base, updates=updates, out=out, strategy=strategy, device="cpu", threads=2)

run(3)
before = peak()
run(40)
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

    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), name],
        check=True,
        capture_output=True,
        text=True,
    )

    assert int(done.stdout) < LIMITS[name] * 1_000_000
