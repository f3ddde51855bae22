"""Asking a model over HTTP, in ratio to calling torch directly in one process: latency and images a second.

python benchmarks/inference.py [--against FOLDER]

Every repetition calls torch and then the server, so that both see the same load beside them. `--against` names a checkout of
another version, whose server is asked alternately with this one's.
"""

import argparse
import contextlib
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import fl_client  # noqa: E402
from fl_client.client import FitResult, SwagResult  # noqa: E402
from tests.system.processes import environment, started  # noqa: E402
from tests.system.servers import free_port  # noqa: E402

DRAWS = 10
MEMBERS = 3
SPREAD = 0.01  # standard deviation of SWAG's weights
METHODS = ("NONE", "MC_DROPOUT", "SWAG", "ENSEMBLE")
UNCOUNTED = 3


def network(seed: int = 1) -> nn.Module:
    """Images of 28 x 28 to ten logits; 0.2 million parameters."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(800, 256), nn.ReLU(), nn.Dropout(0.5), nn.Linear(256, 10),
    ).eval()  # fmt: skip


class Site(fl_client.Client):
    """Leaves the weights as they are, and says that they spread."""

    def fit(self, weights: dict[str, Any], config: dict[str, Any], context: Any) -> FitResult:
        return FitResult(weights, num_examples=1)

    def swag(self, weights: dict[str, Any], config: dict[str, Any], context: Any) -> SwagResult:
        first = {name: array.astype(np.float64) for name, array in weights.items()}
        second = {name: array**2 + SPREAD**2 for name, array in first.items()}
        return SwagResult(first, second, num_examples=1)


@contextlib.contextmanager
def server(tree: Path, folder: Path, threads: int) -> Iterator[tuple[httpx.Client, dict[str, str]]]:
    """A connection to a server, and the id of the model to ask by each method."""
    port = free_port()
    env = environment(
        DJANGO_SETTINGS_MODULE="fl_server.settings.embedded", FL_DATA_DIR=str(folder / "data"),
        FL_OPEN_REGISTRATION="1", FL_INFERENCE_THREADS=str(threads),
    )  # fmt: skip
    command = [sys.executable, "manage.py", "serve", "--port", str(port)]
    with started(command, env=env, log=folder / "log", cwd=tree) as process:
        process.wait_for("Serving at")
        url = f"http://127.0.0.1:{port}"
        with httpx.Client(base_url=f"{url}/api", timeout=120, trust_env=False) as http:
            site = fl_client.connect(url).users.register("site", "a long pass phrase", client=True)
            person = {"username": "asks", "password": "a long pass phrase", "actor": True}
            token = http.post("/users/", json=person).json()["token"]
            http.headers["Authorization"] = f"Token {token}"
            models = [upload(http, network(seed + 1)) for seed in range(MEMBERS)]
            with fl_client.connect(url, token=token) as fl:
                training = fl.trainings.create(
                    model=models[0],
                    rounds=1,
                    clients=[site["id"]],
                    uncertainty_method="SWAG",
                    options={"skip_model_tests": True},
                )
                training.start()
                fl_client.run(Site(), url=url, token=site["token"], workdir=folder / "site")
            body = {"name": "mean", "description": "-", "type": "MEAN", "models": models}
            mean = str(http.post("/models/", json=body).json()["model_id"])
            yield http, {**dict.fromkeys(METHODS, models[0]), "ENSEMBLE": mean}


def upload(http: httpx.Client, module: nn.Module) -> str:
    file = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):
        torch.jit.save(torch.jit.script(module), file)
    body = {"name": "net", "description": "-"}
    sent = http.post("/models/", data=body, files={"model_file": file.getvalue()})
    return str(sent.json()["model_id"])


def directly(modules: list[nn.Module], images: torch.Tensor, method: str) -> torch.Tensor:
    """What the method calculates, as a script would: mean probabilities, or the index of the largest."""
    module = modules[0].eval()
    with torch.inference_mode():
        if method == "NONE":
            return module(images).argmax(1)
        if method == "ENSEMBLE":
            return torch.stack([member.eval()(images).softmax(1) for member in modules]).mean(0)
        if method == "MC_DROPOUT":
            for layer in module.modules():
                if isinstance(layer, nn.Dropout):
                    layer.train()
            return torch.stack([module(images).softmax(1) for _ in range(DRAWS)]).mean(0)
        own = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        drawn = []
        for _ in range(DRAWS):
            for name, tensor in module.state_dict().items():
                tensor.copy_(own[name] + SPREAD * torch.randn_like(tensor))
            drawn.append(module(images).softmax(1))
        module.load_state_dict(own)
        return torch.stack(drawn).mean(0)


def seconds(calls: list[Callable[[], object]], repeats: int) -> list[list[float]]:
    """Of each call, taken in turn; the first rounds are not counted."""
    found: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats + UNCOUNTED):
        for call, times in zip(calls, found, strict=True):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    return [times[UNCOUNTED:] for times in found]


def question(http: httpx.Client, model: str, method: str, body: bytes) -> Callable[[], None]:
    options = {"uncertainty": {"N": DRAWS, "output": "logits"}}
    form = {"model_id": model, "uncertainty_method": method, "options": json.dumps(options)}

    def ask() -> None:
        answer = http.post("/inference/", data=form, files={"model_input": body})
        while answer.status_code == 202:  # the first one starts a process
            time.sleep(0.05)
            answer = http.get(answer.json()["url"].removeprefix("/api"))
        assert answer.status_code == 200, answer.text

    return ask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=100, help="of single images")
    parser.add_argument("--batches", type=int, default=15, help="repetitions of batches")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1, help="of torch, here and there")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--against", type=Path, help="a checkout of another version")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    trees = {"": ROOT, **({"other": arguments.against.resolve()} if arguments.against else {})}
    table = Table(
        "method", "images", "server", "torch p50 ms", "p50 ms", "p95 ms", "more ms", "ratio"
    )
    modules, figures = [network(seed + 1) for seed in range(MEMBERS)], []
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        servers = {}
        for name, tree in trees.items():
            (Path(folder) / f"of {name}").mkdir()
            servers[name] = stack.enter_context(
                server(tree, Path(folder) / f"of {name}", arguments.threads)
            )
        for method in arguments.methods:
            for count, repeats in ((1, arguments.repeats), (arguments.batch, arguments.batches)):
                images = torch.randn(count, 1, 28, 28)
                body = save({"images": images})
                asking = [
                    question(http, models[method], method, body)
                    for http, models in servers.values()
                ]
                bare, *served = seconds(
                    [lambda: directly(modules, images, method), *asking],  # noqa: B023 - called here
                    repeats,
                )
                middle = statistics.median(bare)
                for name, times in zip(servers, served, strict=True):
                    p50, p95 = statistics.median(times), statistics.quantiles(times, n=20)[-1]
                    row = [1e3 * middle, 1e3 * p50, 1e3 * p95, 1e3 * (p50 - middle), middle / p50]
                    figures.append((method, count, name, *row))
                    table.add_row(method, str(count), name, *(f"{value:.2f}" for value in row))
    Console(width=None if sys.stdout.isatty() else 100).print(table)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    )
    print(json.dumps({"commit": commit.stdout.strip(), "figures": figures}))


if __name__ == "__main__":
    main()
