"""The script of the demo: serve, register, train, look, and fail loudly if a promise is broken."""

import argparse
import json
import secrets
import signal
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

import fl_client
from demo.picture import bars, coverage, save_png, summary
from demo.processes import DemoFailed, Federation, free_port, fresh
from demo.questions import ensemble, rankings
from fl_client.connection import Connection
from fl_client.trainings import Training

CONFIG = {"epochs": 3, "lr": 0.05}
NEEDED = 0.93
LONGEST = 180.0  # seconds
MEMBERS = 3  # models of the ensemble; the training itself makes the first
LEAST_AUROC = 0.7
WEBHOOKS = 2  # sites that are told by webhook; the others ask


def register(url: str, sites: int, ports: dict[int, int]) -> tuple[dict[str, Any], list[Any]]:
    """An actor and the sites, as anybody could with open registration."""
    fl = fl_client.connect(url)
    actor = fl.users.register("actor", secrets.token_urlsafe(16), actor=True)
    people = []
    for number in range(sites):
        hook = f"http://127.0.0.1:{ports[number]}/" if number in ports else ""
        people.append(
            fl.users.register(
                f"site-{number}",
                secrets.token_urlsafe(16),
                client=True,
                message_endpoint=hook,
            )
        )
    return actor, people


def begin(
    fl: Connection, folder: Path, seed: int, rounds: int, people: list[Any], **more: Any
) -> tuple[str, Training]:
    """Upload a network with random weights, and start its training."""
    from demo.network import save_program

    model = fl.models.upload(
        name=f"digits {seed}",
        description="64-128-10",
        weights=save_program(folder / "program.pt", seed),
        input_shape=[None, 64],
    )
    training = fl.trainings.create(
        model=model,
        rounds=rounds,
        clients=[person["id"] for person in people],
        aggregation_method="FedAvg",
        **more,
    )
    training.start()
    return model, training


def watch(console: Console, federation: Federation, training: Training, rounds: int) -> None:
    """A progress bar until the training has ended; a line for each round where there is no terminal."""
    started = time.monotonic()
    columns = (
        TextColumn("round {task.completed:.0f}/{task.total:.0f}"),
        BarColumn(),
        TextColumn("{task.fields[said]}"),
        TimeElapsedColumn(),
    )
    told = 0
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        shown = progress.add_task("", total=rounds, said="sites are starting")
        while True:
            federation.check()
            now = training.get()
            accuracies = federated_accuracies(training)
            said = f"{now['local_models_arrived']}/{now['local_models_expected']} updates"
            if accuracies:
                said += f", accuracy {accuracies[-1]:.1%}"
            progress.update(shown, completed=len(accuracies), said=said)
            if not console.is_terminal and len(accuracies) > told:
                told = len(accuracies)
                console.print(f"round {told}/{rounds}: accuracy {accuracies[-1]:.1%}")
            if now["state"] == "C":
                return
            if now["state"] in {"E", "X"}:
                raise DemoFailed(f"the training ended: {now['reason']}")
            if time.monotonic() - started > LONGEST:
                raise DemoFailed(f"the training took more than {LONGEST:.0f} s")
            time.sleep(0.25)


def federated_accuracies(training: Training) -> list[float]:
    """The sample-weighted mean of what the sites measured, by round."""
    rows = training.metrics()
    means = [r for r in rows if r["reporter"] is None and r["key"] == "accuracy"]
    return [row["value_float"] for row in sorted(means, key=lambda row: row["step"])]


def updates_per_round(training: Training) -> list[int]:
    """How many updates each round was made of."""
    return [
        sum(p["kind"] == "train" and p["state"] == "done" for p in round["participation"])
        for round in training.rounds()
    ]


def broken_promise(result: dict[str, Any]) -> str | None:
    """What the run should have shown and did not."""
    if len(result["accuracies"]) != result["rounds"]:
        return f"only {len(result['accuracies'])} of {result['rounds']} rounds were evaluated"
    if min(result["updates_per_round"]) < len(result["sites"]):
        return f"a round was made of {min(result['updates_per_round'])} updates only"
    if result["accuracy"] <= result["best_alone"]:
        return "the federated model is not better than the best site alone"
    if result["accuracy"] < NEEDED:
        return f"the accuracy of {result['accuracy']:.1%} is below {NEEDED:.0%}"
    for method, ranking in result["rankings"].items():
        if ranking["auroc"] is None or ranking["auroc"] < LEAST_AUROC:
            return f"the uncertainty of {method} does not find the errors: AUROC {ranking['auroc']}"
    return None


def run(console: Console, folder: Path, rounds: int, sites: int) -> dict[str, Any]:
    """One whole demo; the server and the sites are gone when it returns."""
    started = time.monotonic()
    password = secrets.token_urlsafe(12)
    ports = {number: free_port() for number in range(min(WEBHOOKS, sites))}
    with Federation(folder) as federation:
        console.print("Starting the server …")
        federation.serve(password)
        actor, people = register(federation.url, sites, ports)
        for number, person in enumerate(people):
            federation.start_site(
                {
                    "number": number,
                    "sites": sites,
                    "url": federation.url,
                    "token": person["token"],
                    "mode": "webhook" if number in ports else "poll",
                    "port": ports.get(number, 0),
                    "workdir": str(folder / f"site-{number}"),
                    "config": CONFIG,
                    "rounds": rounds,
                }
            )
        console.print(f"Server at {federation.url}; {sites} sites, each a process of its own.")
        fl = fl_client.connect(federation.url, token=actor["token"])
        began = time.monotonic()
        model, training = begin(
            fl, folder, 0, rounds, people,
            metric_names=["accuracy"],
            uncertainty_method="SWAG",
            options={"client_config": CONFIG},
        )  # fmt: skip
        others = [
            begin(
                fl,
                folder,
                seed,
                (rounds + 1) // 2,
                people,
                options={"client_config": CONFIG, "skip_model_tests": True},
            )
            for seed in range(1, MEMBERS)
        ]
        watch(console, federation, training, rounds)
        seconds = time.monotonic() - began
        accuracies = federated_accuracies(training)
        counts = updates_per_round(training)
        for _, other in others:
            other.wait(LONGEST)
        console.print(
            "Asking it about corrupted digits, and training each site alone, to compare …"
        )
        asked = time.monotonic()
        mean = ensemble(fl, [model, *(member for member, _ in others)])
        found = rankings(fl, model, mean, folder)
        asked = time.monotonic() - asked
        reports = federation.reports(60)
    told = [
        {**report, "name": f"site-{n}", "mode": "webhook" if n in ports else "long-poll"}
        for n, report in enumerate(reports)
    ]
    return {
        "training": training.id,
        "rounds": rounds,
        "accuracies": accuracies,
        "accuracy": accuracies[-1] if accuracies else 0.0,
        "updates_per_round": counts,
        "best_alone": max(site["alone"] for site in told),
        "sites": told,
        "rankings": {name: ranking.to_json() for name, ranking in found.items()},
        "seconds_asking": asked,
        "bytes_down": sum(site["down"] for site in told),
        "bytes_up": sum(site["up"] for site in told),
        "seconds": seconds,
        "total_seconds": time.monotonic() - started,
        "password": password,
    }


def main() -> int:
    """0 if the demo has shown what it promises, 1 if not, 130 if it was stopped."""
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--rounds", type=int, default=10, choices=range(1, 101), metavar="1..100")
    parser.add_argument("--clients", type=int, default=5, choices=range(2, 11), metavar="2..10")
    parser.add_argument("--folder", type=Path, default=Path("demo-output"))
    parser.add_argument("--json", type=Path, help="also write the result here")
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 100)
    folder = options.folder.resolve()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: clean up, then end
    try:
        fresh(folder)
        result = run(console, folder, options.rounds, options.clients)
    except (DemoFailed, fl_client.FLError) as error:
        return failed(console, str(error))
    except KeyboardInterrupt:
        console.print("Stopped; every process of the demo has ended.")
        return 130
    password = result.pop("password")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2))
    save_png(folder / "accuracy.png", result["accuracies"], result["best_alone"])
    bars(console, result["accuracies"])
    summary(console, result)
    coverage(console, folder / "coverage.svg", result["rankings"])
    console.print(
        f"As pictures: {folder / 'accuracy.png'}\n             {folder / 'coverage.svg'}",
        highlight=False,
        soft_wrap=True,
    )
    console.print(
        f"To look around, start the server again:  FL_DATA_DIR={folder / 'data'} make serve\n"
        f"  admin     http://127.0.0.1:8000/admin/   user admin, password {password}\n"
        "  API docs  http://127.0.0.1:8000/api/schema/swagger-ui/",
        highlight=False,
        soft_wrap=True,
    )
    broken = broken_promise(result)
    return failed(console, broken) if broken else 0


def failed(console: Console, why: str) -> int:
    """Say so, and give the exit status."""
    console.print("The demo failed:", style="red", end=" ")
    console.print(why, markup=False, soft_wrap=True)
    return 1


if __name__ == "__main__":
    sys.exit(main())
