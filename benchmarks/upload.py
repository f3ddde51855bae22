"""One 400 MB update over HTTP: MB/s beside a plain copy of the same file, and the web process's memory.

python benchmarks/upload.py --megabytes 400
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from safetensors.numpy import save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.load import LoadClient  # noqa: E402
from benchmarks.rounds import call, embedded, upload_model  # noqa: E402


def high_water(pid: int) -> int:
    """Peak resident bytes of one process since the last reset."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM")


def plain_copy(source: Path, target: Path) -> float:
    """Seconds to copy and fsync: what any server that keeps its word has to do."""
    started = time.monotonic()
    shutil.copyfile(source, target)
    with target.open("rb+") as handle:
        os.fsync(handle.fileno())
    seconds = time.monotonic() - started
    target.unlink()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="flb-") as name:
        folder = Path(name)
        file = folder / "update.safetensors"
        size = options.megabytes * 10**6
        values = np.random.default_rng(0).standard_normal(size // 4, dtype=np.float32)
        save_file({"layer.weight": values}, file)
        del values
        uploads, copies, growth = [], [], 0
        with embedded(folder, 2) as (url, pids):
            actor = call(
                url, "users/", {"username": "actor", "password": "ben-ch-mark-1", "actor": True}
            )
            site = call(
                url, "users/", {"username": "site", "password": "ben-ch-mark-1", "client": True}
            )
            model = upload_model(url, actor["token"], file)
            body = {
                "model_id": model,
                "target_num_updates": options.repeat,
                "metric_names": [],
                "aggregation_method": "FedAvg",
                "options": {"skip_model_tests": True},
                "clients": [site["id"]],
            }
            training = call(url, "trainings/", body, actor["token"])["training_id"]
            call(url, f"trainings/{training}/start/", {}, actor["token"])
            client = LoadClient({"url": url, "file": str(file)}, site["token"], 0)
            for round in range(options.repeat):
                while call(url, "tasks/?wait=25", None, site["token"], "GET")["state"] != "task":
                    pass
                Path(f"/proc/{pids[0]}/clear_refs").write_text("5")  # reset the high-water mark
                before = high_water(pids[0])
                started = time.monotonic()
                client.upload({"round": round, "upload_url": f"/api/models/{model}/"})
                uploads.append(time.monotonic() - started)
                growth = max(growth, high_water(pids[0]) - before)
                copies.append(plain_copy(file, folder / "copy"))
    table = Table(title=f"One update of {options.megabytes} MB, embedded server, loopback")
    for column in ("upload MB/s", "copy + fsync MB/s", "upload / copy time", "web RSS growth MB"):
        table.add_column(column, justify="right")
    up, copy = statistics.median(uploads), statistics.median(copies)
    table.add_row(
        f"{size / up / 1e6:.0f}",
        f"{size / copy / 1e6:.0f}",
        f"{up / copy:.2f}",
        f"{growth / 1e6:.0f}",
    )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
