"""A round of N clients over HTTP: seconds, the server's CPU seconds and its peak memory.

python benchmarks/rounds.py --server embedded --params 250000 10000000
python benchmarks/rounds.py --server production --params 250000 10000000
"""

import argparse
import contextlib
import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table
from safetensors.numpy import save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


class Meter(threading.Thread):
    """CPU seconds and peak memory (sum of PSS) of some processes and their children."""

    def __init__(self, pids: list[int]) -> None:
        super().__init__(daemon=True)
        self.roots = [psutil.Process(pid) for pid in pids]
        self.peak = 0
        self.baseline = self.memory()
        self.stop = threading.Event()

    def processes(self) -> list[psutil.Process]:
        found = {process.pid: process for process in self.roots}
        for root in self.roots:
            with contextlib.suppress(psutil.Error):
                found.update({child.pid: child for child in root.children(recursive=True)})
        return list(found.values())

    def memory(self) -> int:
        total = 0
        for process in self.processes():
            with contextlib.suppress(OSError, psutil.Error):
                for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
                    if line.startswith("Pss:"):
                        total += int(line.split()[1]) * 1024
        return total

    def cpu(self) -> float:
        total = 0.0
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def run(self) -> None:
        while not self.stop.wait(0.05):
            self.peak = max(self.peak, self.memory())


@contextlib.contextmanager
def embedded(folder: Path, clients: int) -> Iterator[tuple[str, list[int]]]:
    """`manage.py serve` on a free port."""
    from tests.system.processes import until
    from tests.system.servers import free_port

    port = free_port()
    environment = {
        **os.environ,
        "FL_DATA_DIR": str(folder / "data"),
        "FL_OPEN_REGISTRATION": "1",
        "FL_ADMIN_PASSWORD": secrets.token_urlsafe(16),
        "FL_LOG_LEVEL": "WARNING",
    }
    command = [sys.executable, "manage.py", "serve", "--port", str(port)]
    command += ["--threads", str(max(32, clients * 2))]
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        try:
            url = f"http://127.0.0.1:{port}"
            until(lambda: answers(f"{url}/livez"), "the server")
            yield url, [process.pid]
        finally:
            process.terminate()
            process.wait(20)


@contextlib.contextmanager
def production(folder: Path, clients: int) -> Iterator[tuple[str, list[int]]]:
    """Two web processes, Celery, PostgreSQL and Redis, as docker-compose.yml runs them (without the TLS proxy)."""
    from tests.system.servers import Postgres, Redis
    from tests.system.test_production import Deployment

    database, redis = Postgres(), Redis()
    try:
        deployed = Deployment(folder, database.create("bench"), redis)
        with deployed.up():
            pids = [process.pid for process in deployed.processes.values()]
            yield f"http://localhost:{deployed.web_port}", [*pids, database.pid, redis.pid]
        deployed.proxy.close()
    finally:
        redis.stop()
        database.stop()


def answers(url: str) -> bool:
    """Whether somebody answers at an address."""
    try:
        with urllib.request.urlopen(url, timeout=2):  # noqa: S310
            return True
    except OSError:
        return False


def call(url: str, path: str, body: object = None, token: str = "", method: str = "POST") -> dict:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{url}/api/{path}", data, method=method)  # noqa: S310
    request.add_header("Content-Type", "application/json")
    request.add_header("X-Forwarded-Proto", "https")  # what the proxy would say
    if token:
        request.add_header("Authorization", f"Token {token}")
    with urllib.request.urlopen(request) as response:  # noqa: S310
        return json.load(response)


def upload_model(url: str, token: str, file: Path) -> str:
    command = ["curl", "-sS", "-H", f"Authorization: Token {token}", f"{url}/api/models/"]
    command += ["-H", "X-Forwarded-Proto: https", "-F", "name=bench", "-F", "description=bench"]
    answer = subprocess.run(
        [*command, "-F", f"model_file=@{file}"], capture_output=True, check=True
    )
    return json.loads(answer.stdout)["model_id"]


def measure(
    url: str, pids: list[int], folder: Path, params: int, clients: int, rounds: int
) -> dict[str, float]:
    """One training of `rounds` rounds; the first one warms up and does not count."""
    suffix = secrets.token_hex(4)

    def register(name: str, **fields: bool) -> dict:
        password = secrets.token_urlsafe(16)
        body = {"username": f"{name}-{suffix}", "password": password, **fields}
        return call(url, "users/", body)

    file = folder / f"model-{params}.safetensors"
    values = np.random.default_rng(0).standard_normal(params, dtype=np.float32)
    save_file({"layer.weight": values.reshape(-1, 1000 if params % 1000 == 0 else 1)}, file)
    actor = register("actor", actor=True)
    sites = [register(f"site{n}", client=True) for n in range(clients)]
    training = call(
        url,
        "trainings/",
        {
            "model_id": upload_model(url, actor["token"], file),
            "target_num_updates": rounds,
            "metric_names": [],
            "aggregation_method": "FedAvg",
            "options": {"skip_model_tests": True},
            "clients": [site["id"] for site in sites],
        },
        actor["token"],
    )["training_id"]
    job = {"url": url, "file": str(file), "tokens": [site["token"] for site in sites]}
    load = subprocess.Popen(
        [sys.executable, str(ROOT / "benchmarks/load.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    meter = Meter(pids)
    meter.start()
    before, started = meter.cpu(), time.monotonic()
    call(url, f"trainings/{training}/start/", {}, actor["token"])
    output, _ = load.communicate(json.dumps(job) + "\n", timeout=1800)
    cpu = meter.cpu() - before
    meter.stop.set()
    meter.join()
    state = call(url, f"trainings/{training}/", None, actor["token"], "GET")
    if state["state"] != "C":
        raise RuntimeError(f"the training ended in {state['state']}: {state.get('reason')}")
    seconds = json.loads(output)[1:]
    file.unlink()
    return {
        "median": statistics.median(seconds),
        "best": min(seconds),
        "cpu": cpu / rounds,
        "peak": meter.peak,
        "base": meter.baseline,
        "total": time.monotonic() - started,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--server", choices=["embedded", "production"], default="embedded")
    parser.add_argument("--params", type=int, nargs="+", default=[250_000, 10_000_000])
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=6)
    options = parser.parse_args()
    table = Table(title=f"A round of {options.clients} clients, {options.server}, no training")
    for column in ("P", "median s", "best s", "server CPU s a round", "server peak MB", "idle MB"):
        table.add_column(column, justify="right")
    start = {"embedded": embedded, "production": production}[options.server]
    with tempfile.TemporaryDirectory(prefix="flb-") as name:
        folder = Path(name)
        with start(folder, options.clients) as (url, pids):
            for params in options.params:
                row = measure(url, pids, folder, params, options.clients, options.rounds)
                table.add_row(
                    f"{params:,}",
                    f"{row['median']:.2f}",
                    f"{row['best']:.2f}",
                    f"{row['cpu']:.2f}",
                    f"{row['peak'] / 1e6:.0f}",
                    f"{row['base'] / 1e6:.0f}",
                )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
