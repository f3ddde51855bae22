"""Hundreds of clients wait, some of them are asked in each round: errors, latency, memory, connections.

python benchmarks/waiting.py --clients 500 --sample 100 --rounds 200 --server production

Exit status 1 if a bound is broken: any error (a request that got no answer is one), 30 PostgreSQL connections, 400 MB
in the web processes, or a process that grows by 5 % after the 20th round (where there are at least 100 rounds).
Figures also go to benchmarks/results/waiting-<server>.json.
"""

import argparse
import contextlib
import http.client
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from safetensors.numpy import save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.rounds import answers, call, upload_model  # noqa: E402
from benchmarks.watch import Watch  # noqa: E402

IDLE_SECONDS = 10.0  # how long everybody waits before the first round
PROBE_PAUSE = 0.2  # seconds between two control calls
WARM_ROUNDS = 20  # memory may grow until then
KNOWING = (
    "all who are asked next know",
    "one who is asked next knows",
    "a client knows of the end",
)
# first value that is bad
BOUNDS = {"errors": 1, "processes that ended": 1, "connections": 30, "web MB": 400, "drift %": 5.0}


@dataclass
class Server:
    """One that runs: where, and which processes are it."""

    url: str
    roles: Mapping[str, int]
    environment: Mapping[str, str]
    database_url: str | None = None

    def accounts(self, sites: int) -> dict[str, Any]:
        command = [sys.executable, str(ROOT / "benchmarks/accounts.py"), str(sites)]
        done = subprocess.run(command, env=dict(self.environment), capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)
        return json.loads(done.stdout)


@contextlib.contextmanager
def embedded(folder: Path) -> Iterator[Server]:
    """`manage.py serve` as it comes."""
    from tests.system.processes import environment, started, until
    from tests.system.servers import free_port

    port = free_port()
    settings = environment(
        DJANGO_SETTINGS_MODULE="fl_server.settings.embedded",
        FL_DATA_DIR=str(folder / "data"),
        FL_ADMIN_PASSWORD=secrets.token_urlsafe(16),
        FL_LOG_LEVEL="WARNING",
    )
    command = [sys.executable, "manage.py", "serve", "--port", str(port)]
    with started(command, env=settings, log=folder / "serve.log") as process:
        url = f"http://127.0.0.1:{port}"
        until(lambda: answers(f"{url}/livez"), "the server")
        until(process.children, "the child that aggregates")
        yield Server(url, {"web": process.pid, "child": process.children()[0].pid}, settings)


@contextlib.contextmanager
def production(folder: Path) -> Iterator[Server]:
    """docker-compose.yml's services, without the TLS proxy, with its own times for leases and sweeps."""
    from tests.system.servers import Postgres, Redis
    from tests.system.test_production import Deployment

    class Usual(Deployment):
        def env(self, service: str) -> dict[str, str]:
            usual = {"FL_LEASE_SECONDS": "60", "FL_SWEEP_SECONDS": "5", "FL_LOG_LEVEL": "WARNING"}
            return {**super().env(service), **usual}

    database, redis = Postgres(), Redis()
    try:
        url = database.create("waiting")
        deployed = Usual(folder, url, redis)
        with deployed.up():
            roles = {name: process.pid for name, process in deployed.processes.items()}
            roles |= {"postgres": database.pid, "redis": redis.pid}
            base = f"http://localhost:{deployed.web_port}"
            yield Server(base, roles, deployed.env("setup"), url)
        deployed.proxy.close()
    finally:
        redis.stop()
        database.stop()


@dataclass
class Probe(threading.Thread):
    """Somebody who uses the server meanwhile: one control call after the other, each timed."""

    url: str
    actor: str
    sites: list[str]
    training: str
    task: tuple[str, int] | None = None  # its id and whose it is
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    errors: Counter[str] = field(default_factory=Counter)
    done: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        super().__init__(daemon=True)

    __hash__ = threading.Thread.__hash__

    def run(self) -> None:
        number = 0
        while not self.done.wait(PROBE_PAUSE):
            number += 1
            if number % 3 == 0:
                self._ask("GET users/myself/", self.actor)
            elif number % 3 == 1:
                self._ask(f"GET trainings/{self.training}/", self.actor, "GET trainings/<id>/")
            elif self.task is not None:
                task, site = self.task
                self._ask(
                    f"POST tasks/{task}/progress/", self.sites[site], "POST tasks/<id>/progress/"
                )

    def _ask(self, call: str, token: str, name: str = "") -> None:
        method, path = call.split()
        at = urlsplit(self.url)
        headers = {"Authorization": f"Token {token}", "X-Forwarded-Proto": "https"}
        body = None
        if method == "POST":
            body, headers["Content-Type"] = '{"step": 1, "of": 2}', "application/json"
        began = time.monotonic()
        connection = http.client.HTTPConnection(at.hostname or "", at.port, timeout=60)
        try:
            connection.request(method, f"/api/{path}", body, headers)
            answer = connection.getresponse()
            answer.read()
            if answer.status != 200:
                self.errors[f"{name or call}: {answer.status}"] += 1
        except (OSError, http.client.HTTPException) as error:
            self.errors[f"{name or call}: {error!r}"] += 1
        finally:
            connection.close()
        self.seconds[name or call].append(time.monotonic() - began)


def training_of(
    server: Server, people: dict[str, Any], file: Path, rounds: int, sample: int
) -> str:
    """Created, not started; `sample` of all sites in each round."""
    token = people["actor"]["token"]
    body = {
        "model_id": upload_model(server.url, token, file),
        "target_num_updates": rounds,
        "metric_names": [],
        "aggregation_method": "FedAvg",
        "options": {"skip_model_tests": True, "sampling": "fixed", "clients_per_round": sample},
        "clients": [site["id"] for site in people["sites"]],
    }
    return call(server.url, "trainings/", body, token)["training_id"]


def percentiles(values: list[float]) -> dict[str, float]:
    """p50, p95, p99 and the largest; empty of nothing."""
    if not values:
        return {}
    p50, p95, p99 = np.percentile(values, [50, 95, 99])
    return {"p50": p50, "p95": p95, "p99": p99, "max": max(values), "count": len(values)}


def measure(server: Server, folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """One training from start to end, with everything that is reported about it."""
    file = folder / "model.safetensors"
    values = np.random.default_rng(0).standard_normal(given.params, np.float32)
    save_file({"layer.weight": values}, file)
    people = server.accounts(given.clients)
    training = training_of(server, people, file, given.rounds, given.sample)
    token = people["actor"]["token"]
    tokens = [site["token"] for site in people["sites"]]
    watch = Watch(server.roles, server.database_url)
    probe = Probe(server.url, token, tokens, training)
    crowd = subprocess.Popen(
        [sys.executable, str(ROOT / "benchmarks/crowd.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert crowd.stdin is not None
    assert crowd.stdout is not None
    summary: dict[str, Any] = {}
    try:
        job = {"url": server.url, "file": str(file), "tokens": tokens, "sample": given.sample}
        crowd.stdin.write(json.dumps(job) + "\n")
        crowd.stdin.flush()
        started = rounds_began = 0.0
        cpu: dict[str, float] = {}
        with Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TimeRemainingColumn(), console=Console(stderr=True),
        ) as bar:  # fmt: skip
            shown = bar.add_task(f"{given.clients} clients connect", total=given.rounds)
            for text in crowd.stdout:
                line = json.loads(text)
                if "connected" in line:
                    time.sleep(2.0)
                    watch.start()
                    bar.update(shown, description=f"{given.clients} clients wait")
                    time.sleep(given.idle)
                    cpu, started = watch.cpu(), time.monotonic()
                    call(server.url, f"trainings/{training}/start/", {}, token)
                    probe.start()
                elif "task" in line:
                    watch.round = line["round"]
                    probe.task = line["task"], line["site"]
                    rounds_began = rounds_began or time.monotonic()
                elif "closed" in line:
                    bar.update(shown, advance=1, description=f"round {line['closed']}")
                else:
                    summary = line
        seconds = time.monotonic() - started
        spent = {role: value - cpu.get(role, 0.0) for role, value in watch.cpu().items()}
    finally:
        crowd.kill()
        crowd.wait()
        for thread in (watch, probe):
            thread.done.set()
    probe.join(60)
    watch.join(10)
    state = call(server.url, f"trainings/{training}/", None, token, "GET")
    errors = Counter(summary.get("errors", {"the clients ended early": 1}))
    errors.update(probe.errors)
    if state["state"] != "C":
        errors[f"the training ended in {state['state']}: {state.get('reason')}"] += 1
    for kind, what in (("updates", "updates"), ("asked", "clients that heard of them")):
        seen = summary.get(kind, {})
        wrong = {number: count for number, count in seen.items() if count != given.sample}
        if wrong or len(seen) != given.rounds:
            errors[f"rounds without {given.sample} {what}: {wrong or 'some are missing'}"] += 1
    if len(summary.get("over", [])) != given.clients:
        errors[f"only {len(summary.get('over', []))} clients heard of the end"] += 1
    return report(given, summary, watch, probe, errors, spent, seconds)


def report(
    given: argparse.Namespace,
    summary: dict[str, Any],
    watch: Watch,
    probe: Probe,
    errors: Counter[str],
    spent: dict[str, float],
    seconds: float,
) -> dict[str, Any]:
    idle = [sample for sample in watch.samples if sample.round < 0]
    busy = [sample for sample in watch.samples if sample.round >= 0]
    knowing: dict[str, list[float]] = summary.get("knowing", {})
    since = WARM_ROUNDS if given.rounds >= 5 * WARM_ROUNDS else given.rounds // 4
    calls = [value for values in probe.seconds.values() for value in values]
    return {
        "clients": given.clients,
        "sample": given.sample,
        "rounds": given.rounds,
        "params": given.params,
        "seconds": seconds,
        "errors": dict(errors),
        "reconnects": summary.get("reconnects", 0),
        "control": {"all": percentiles(calls)}
        | {name: percentiles(values) for name, values in probe.seconds.items()},
        "transfers": {k: percentiles(v) for k, v in summary.get("seconds", {}).items()},
        # From the last update of a round until those who are asked in the next one have their tasks: all, and each. The
        # others learn nothing then, and go on waiting; from that of the last round until each client hears of the end.
        "all who are asked next know": percentiles([max(values) for values in knowing.values()]),
        "one who is asked next knows": percentiles(
            [v for values in knowing.values() for v in values]
        ),
        "a client knows of the end": percentiles(summary.get("over", [])),
        "connections": {
            "waiting": max((s.connections or 0 for s in idle), default=0),
            "rounds": percentiles([float(s.connections or 0) for s in busy]),
        },
        "web": {
            "waiting rss": max((s.web_rss for s in idle), default=0),
            "waiting pss": max((s.web_pss for s in idle), default=0),
            "rounds rss": max((s.web_rss for s in busy), default=0),
            "rounds pss": max((s.web_pss for s in busy), default=0),
            "waiting threads": idle[-1].web_threads if idle else [],
            "rounds threads": max((s.web_threads for s in busy), key=sum, default=[]),
        },
        "drift": {"since": since, "percent": watch.drift(since)},
        "turnover": watch.turnover(),
        "memory": watch.samples[-1].rss if watch.samples else {},
        "series": watch.series(),
        "cpu": spent,
    }


def broken(found: dict[str, Any]) -> list[str]:
    """The bounds that this run has broken, in words."""
    connections = max(
        found["connections"]["waiting"], found["connections"]["rounds"].get("max", 0.0)
    )
    memory = max(found["web"]["waiting rss"], found["web"]["rounds rss"]) / 1e6
    figures = {
        "errors": sum(found["errors"].values()),
        "processes that ended": sum(seen["ended"] for seen in found["turnover"].values()),
        "connections": connections,
        "web MB": memory,
    }
    if found["rounds"] >= 5 * WARM_ROUNDS:
        figures["drift %"] = max(found["drift"]["percent"].values(), default=0.0)
    return [
        f"{name}: {value:.0f}, must be below {BOUNDS[name]:.0f}"
        for name, value in figures.items()
        if value >= BOUNDS[name]
    ]


def milliseconds(found: dict[str, float]) -> str:
    if not found:
        return "-"
    return " / ".join(f"{1000 * found[key]:.0f}" for key in ("p50", "p95", "p99", "max"))


def shown(found: dict[str, Any], server: str) -> Table:
    title = f"{found['clients']} clients wait, {found['sample']} a round, {server}"
    table = Table(title=title)
    table.add_column("what")
    table.add_column("value", justify="right")
    web, drift = found["web"], found["drift"]
    table.add_row("rounds, seconds for all", f"{found['rounds']}, {found['seconds']:.1f}")
    table.add_row("errors", str(sum(found["errors"].values())))
    table.add_row("connections made again", str(found["reconnects"]))
    for name, values in found["control"].items():
        table.add_row(f"control calls, {name}: p50 / p95 / p99 / max ms", milliseconds(values))
    for name in KNOWING:
        table.add_row(
            f"from the last update until {name}: p50 / p95 / p99 / max ms",
            milliseconds(found[name]),
        )
    for name, values in found["transfers"].items():
        table.add_row(f"{name}: p50 / p95 / p99 / max ms", milliseconds(values))
    if server == "production":
        busiest = found["connections"]["rounds"].get("max", 0.0)
        table.add_row(
            "PostgreSQL connections: waiting, in rounds",
            f"{found['connections']['waiting']}, {busiest:.0f}",
        )
    table.add_row(
        "web MB, RSS (PSS): waiting, in rounds",
        f"{web['waiting rss'] / 1e6:.0f} ({web['waiting pss'] / 1e6:.0f}), "
        f"{web['rounds rss'] / 1e6:.0f} ({web['rounds pss'] / 1e6:.0f})",
    )
    table.add_row(
        "threads of each web process: waiting, in rounds",
        f"{web['waiting threads']}, {web['rounds threads']}",
    )
    for name, percent in sorted(drift["percent"].items()):
        size = found["memory"].get(name, 0) / 1e6
        table.add_row(
            f"growth of {name} ({size:.0f} MB) since round {drift['since']}", f"{percent:+.1f} %"
        )
    for role, seen in found["turnover"].items():
        table.add_row(
            f"processes of {role} that ended, and that joined", f"{seen['ended']}, {seen['joined']}"
        )
    spent = ", ".join(f"{role} {value:.1f}" for role, value in found["cpu"].items())
    table.add_row("CPU seconds", spent)
    return table


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # its servers end with it
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--server", choices=["embedded", "production"], default="production")
    parser.add_argument("--clients", type=int, default=500)
    parser.add_argument("--sample", type=int, default=100, help="clients that each round asks")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--params", type=int, default=10_000, help="float32 parameters")
    parser.add_argument("--idle", type=float, default=IDLE_SECONDS, help="seconds before round 0")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results")
    given = parser.parse_args()
    start = {"embedded": embedded, "production": production}[given.server]
    with tempfile.TemporaryDirectory(prefix="flb-") as name, start(Path(name)) as server:
        found = measure(server, Path(name), given)
    given.results.mkdir(parents=True, exist_ok=True)
    (given.results / f"waiting-{given.server}.json").write_text(json.dumps(found, indent=1) + "\n")
    console = Console(width=120)
    console.print(shown(found, given.server))
    for text, count in found["errors"].items():
        console.print(f"error, {count} times: {text}", markup=False)
    if complaints := broken(found):
        sys.exit("broken: " + "; ".join(complaints))


if __name__ == "__main__":
    main()
