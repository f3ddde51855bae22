"""Asking a model over HTTP, in ratio to calling torch directly in one process.

python benchmarks/inference.py
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

import httpx
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.system.processes import environment, started  # noqa: E402
from tests.system.servers import free_port  # noqa: E402

DRAWS = 10


def network() -> nn.Module:
    """Images of 28 x 28 to ten logits; 0.2 million parameters."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(800, 256), nn.ReLU(), nn.Dropout(0.5), nn.Linear(256, 10),
    ).eval()  # fmt: skip


def times(call: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of each call, after three that are not counted."""
    found = []
    for _ in range(repeats + 3):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return found[3:]


@contextlib.contextmanager
def server(folder: Path) -> Iterator[httpx.Client]:
    port = free_port()
    env = environment(
        DJANGO_SETTINGS_MODULE="fl_server.settings.embedded", FL_DATA_DIR=str(folder / "data"),
        FL_OPEN_REGISTRATION="1",
    )  # fmt: skip
    command = [sys.executable, "manage.py", "serve", "--port", str(port)]
    with started(command, env=env, log=folder / "log", cwd=ROOT) as process:
        process.wait_for("Serving at")
        base = f"http://127.0.0.1:{port}/api"
        with httpx.Client(base_url=base, timeout=120, trust_env=False) as http:
            person = {"username": "asks", "password": "a long pass phrase", "actor": True}
            token = http.post("/users/", json=person).json()["token"]
            http.headers["Authorization"] = f"Token {token}"
            yield http


def upload(http: httpx.Client, module: nn.Module) -> str:
    file = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):
        torch.jit.save(torch.jit.script(module), file)
    body = {"name": "net", "description": "-"}
    sent = http.post("/models/", data=body, files={"model_file": file.getvalue()})
    return str(sent.json()["model_id"])


def directly(module: nn.Module, images: torch.Tensor, method: str) -> torch.Tensor:
    module.eval()
    with torch.inference_mode():
        if method == "NONE":
            return module(images).argmax(1)
        for layer in module.modules():
            if isinstance(layer, nn.Dropout):
                layer.train()
        return torch.stack([module(images).softmax(1) for _ in range(DRAWS)]).mean(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4096)
    arguments = parser.parse_args()
    table = Table("method", "images", "torch p50 ms", "server p50 ms", "p95 ms", "torch / server")
    module, figures = network(), []
    with tempfile.TemporaryDirectory() as folder, server(Path(folder)) as http:
        model = upload(http, module)
        for method in ("NONE", "MC_DROPOUT"):
            for count, repeats in ((1, arguments.repeats), (arguments.batch, 8)):
                images = torch.randn(count, 1, 28, 28)
                body = save({"images": images})
                options = {"uncertainty": {"N": DRAWS, "output": "logits"}}
                form = {
                    "model_id": model,
                    "uncertainty_method": method,
                    "options": json.dumps(options),
                }

                def asked(form: dict[str, str] = form, body: bytes = body) -> None:
                    answer = http.post("/inference/", data=form, files={"model_input": body})
                    assert answer.status_code == 200, answer.text

                bare = statistics.median(times(lambda: directly(module, images, method), repeats))  # noqa: B023
                served = times(asked, repeats)
                middle = statistics.median(served)
                worst = statistics.quantiles(served, n=20)[-1]
                row = [bare * 1000, middle * 1000, worst * 1000, bare / middle]
                figures.append((method, count, *row))
                table.add_row(method, str(count), *(f"{value:.2f}" for value in row))
    Console().print(table)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    )
    print(json.dumps({"commit": commit.stdout.strip(), "figures": figures}))


if __name__ == "__main__":
    main()
