"""Memory depends on the size of a block, never on the number of updates."""

import subprocess
import sys
from pathlib import Path

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
    updates = [UpdateFile(Path(sys.argv[1]) / str(k), UpdateMeta(str(k), k + 1)) for k in range(n)]
    out = Path(sys.argv[1]) / "out"
    aggregate(base=None, updates=updates, out=out, strategy=STRATEGIES["FedAvg"](), device="cpu")

run(2)
before = peak()
run(40)
print(peak() - before)
"""


def test_forty_updates_need_no_more_memory_than_two(tmp_path: Path) -> None:
    for index in range(40):
        save_file({"w": torch.full((PARAMETERS,), float(index))}, tmp_path / str(index))

    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)], check=True, capture_output=True, text=True
    )

    assert int(done.stdout) < 2 * 4 * PARAMETERS  # the other 38 would be 152 MB
