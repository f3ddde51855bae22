"""Memory depends on the size of a block, never on the number of updates: the peak of a process, rule by rule."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fl_server_ai.aggregation import STRATEGIES

PARAMETERS = 1_000_000
MODEL = 4 * PARAMETERS
FILES = 9  # on disk; more updates are the same ones again

MEASURE = """
import ctypes
import json
import sys
from dataclasses import replace
from pathlib import Path
from fl_server_ai.aggregation import STRATEGIES, UpdateMeta
from fl_server_ai.aggregation.engine import UpdateFile, aggregate
from fl_server_ai.testing import furnished

folder = Path(sys.argv[1])

def megabytes(line):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(text.split()[1]) for text in lines if text.startswith(line)) / 1e6

def grown(name, n, threads, masked, options):
    kind = STRATEGIES[name]
    strategy = kind(kind.Options(**options))
    updates = [UpdateFile(folder / str(k % FILES), UpdateMeta(f"{k:04}", k + 1)) for k in range(n)]
    updates = furnished(strategy, updates, folder)
    if masked:
        updates = [replace(update, mask=folder / "mask") for update in updates]
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = megabytes("VmRSS")
    aggregate(
        base=folder / "0", updates=updates, out=folder / "out", strategy=strategy, device="cpu",
        threads=threads, state_out=folder / "state",
    )
    return megabytes("VmHWM") - before

grown("FedAdam", 3, 1, False, {})  # what is loaded at first use
print(json.dumps([grown(**case) for case in json.loads(sys.argv[2])]))
""".replace("FILES", str(FILES))


def case(name: str, n: int = 40, threads: int = 2, masked: bool = False, **options: Any) -> Any:
    return {"name": name, "n": n, "threads": threads, "masked": masked, "options": options}


def grown(folder: Path, cases: list[Any]) -> list[float]:
    """By how many megabytes a process grows at most in each of these rounds, one after the other."""
    generator = torch.Generator().manual_seed(4)
    for index in range(FILES):
        save_file({"w": torch.randn(PARAMETERS, generator=generator)}, folder / str(index))
    save_file({"mask.0": torch.ones(PARAMETERS, dtype=torch.uint8)}, folder / "mask")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder), json.dumps(cases)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    found: list[float] = json.loads(done.stdout)
    return found


def test_forty_updates_fit_into_half_of_their_memory(tmp_path: Path) -> None:
    cases = [*(case(name) for name in STRATEGIES), case("FedAvg", masked=True)]

    peaks = grown(tmp_path, cases)

    limit = 40 * MODEL / 2 / 1e6
    large = {one["name"]: peak for one, peak in zip(cases, peaks, strict=True) if peak > limit}
    assert large == {}
    assert max(peaks) > 5  # it is measured at all


@pytest.mark.heavy
def test_many_threads_and_updates_share_one_budget_of_memory(tmp_path: Path) -> None:
    cases = [case(name, 100, 4) for name in ("FedMedian", "TrimmedMean", "Krum", "GeometricMedian")]
    cases += [case("Bulyan", 100, 4, f=24), case("TrimmedMean", 400), case("FedMedian", 400, 4)]

    # Each twice: what an allocator keeps differs from time to time.
    peaks = grown(tmp_path, cases * 2)

    assert max(peaks) < 80
