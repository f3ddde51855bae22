"""One site, as a process of its own: `python -m demo.client` with its job as JSON on standard input."""

import json
import logging
import sys
from pathlib import Path
from typing import Any

import torch

import fl_client
from demo.data import Site, deal, load
from demo.network import accuracy, build, train
from fl_client.swag import SwagCollector
from fl_client.torch_support import get_weights, load_weights


class DigitsClient(fl_client.Client):
    """Trains on its own digits, and measures on its part of the test set."""

    def __init__(self, site: Site, seed: int) -> None:
        self.site = site
        self.seed = seed
        self.module = build()

    def fit(
        self, weights: dict[str, Any], config: dict[str, Any], context: fl_client.Context
    ) -> fl_client.FitResult:
        load_weights(self.module, weights)
        loss = train(
            self.module,
            self.site.x,
            self.site.y,
            epochs=config["epochs"],
            lr=config["lr"],
            seed=self.seed + 1000 * config["round"],
        )
        return fl_client.FitResult(
            get_weights(self.module), num_examples=len(self.site.y), metrics={"loss": loss}
        )

    def evaluate(
        self, weights: dict[str, Any], config: dict[str, Any], context: fl_client.Context
    ) -> fl_client.EvaluateResult:
        load_weights(self.module, weights)
        share = accuracy(self.module, self.site.test_x, self.site.test_y)
        return fl_client.EvaluateResult({"accuracy": share}, num_examples=len(self.site.test_y))

    def swag(
        self, weights: dict[str, Any], config: dict[str, Any], context: fl_client.Context
    ) -> fl_client.SwagResult:
        """Moments of the weights on their way through one more local training."""
        load_weights(self.module, weights)
        moments = SwagCollector()
        train(
            self.module,
            self.site.x,
            self.site.y,
            epochs=config["epochs"],
            lr=config["lr"],
            seed=self.seed,
            after_step=lambda: moments.add(self.module.state_dict()),
        )
        return moments.result(len(self.site.y))


def alone(site: Site, *, epochs: int, lr: float, seed: int) -> float:
    """Accuracy on the whole test set of the same network trained as long, on this site's data only."""
    module = build()
    train(module, site.x, site.y, epochs=epochs, lr=lr, seed=seed)
    _, _, test_x, test_y = load()
    return accuracy(module, test_x, test_y)


def main() -> None:
    job = json.loads(sys.stdin.readline())
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(1)  # the sites share one laptop
    site = deal(job["sites"])[job["number"]]
    moved = {"down": 0, "up": 0}

    def count(name: str, fields: dict[str, Any]) -> None:
        size = fields["task"]["model"]["bytes"] if name in {"task", "uploaded"} else 0
        if name == "task":
            moved["down"] += size
        elif name == "uploaded" and fields["task"]["kind"] == "train":
            moved["up"] += size

    fl_client.run(
        DigitsClient(site, seed=job["number"]),
        url=job["url"],
        token=job["token"],
        mode=job["mode"],
        listen=("127.0.0.1", job["port"]),
        workdir=Path(job["workdir"]),
        on_event=count,
    )
    config = job["config"]
    steps = config["epochs"] * job["rounds"]
    report = {
        "alone": alone(site, epochs=steps, lr=config["lr"], seed=job["number"]),
        "dominant": site.dominant,
        "dominant_share": float(sum((site.y == c).sum() for c in site.dominant) / len(site.y)),
        "samples": len(site.y),
        **moved,
    }
    sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
