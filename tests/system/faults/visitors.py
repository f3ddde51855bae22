"""Lanes beside the trainings: models that come and go, questions to models, and reports about them."""

import io
import threading
import warnings

import torch
from safetensors.numpy import save
from torch import nn

from tests.system.faults.clients import _good
from tests.system.faults.lanes import Lane
from tests.system.faults.stacks import Stack
from tests.system.questions import INPUT
from tests.system.sites import model

PARAMETERS = 4 * 8 + 8 + 8 * 3 + 3


class Uploads(Lane):
    """Models that come and go: every key makes one model, and every file goes with its model."""

    def turn(self) -> None:
        key = f"{self.name}-{self.turns}"
        content = save(model(200, seed=self.turns))
        made = self.upload(key, content)
        assert self.upload(key, content) == made
        assert _good(self.server.ask("GET", f"/api/models/{made}/")).content == content
        self.forget(made)
        self.turns += 1

    def check(self) -> None:
        left = _good(self.server.ask("GET", "/api/models/")).json()
        assert left == [], f"models that nobody asked for: {left}"


def network(seed: int) -> tuple[nn.Module, bytes]:
    """A small network, and the same as TorchScript."""
    torch.manual_seed(seed)
    made = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    file = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):
        torch.jit.save(torch.jit.script(made), file)
    return made, file.getvalue()


class Questions(Lane):
    """One question after the other to a model whose answer torch knows."""

    def __init__(self, stack: Stack, name: str, stop: threading.Event) -> None:
        super().__init__(stack, name, stop)
        made, content = network(3)
        self.model = self.upload(f"{name}-model", content)
        self.wanted = made(torch.tensor(INPUT)).argmax(1).tolist()

    def turn(self) -> None:
        question = {"model_id": self.model, "model_input": INPUT}
        answer = self.server.ask("POST", "/api/inference/", json=question)
        while answer.status_code == 202:
            self.stop.wait(0.2)
            answer = self.server.ask("GET", answer.json()["url"])
        assert _good(answer).json()["inference"] == self.wanted
        self.turns += 1


class Reports(Lane):
    """A new architecture in each turn: it is counted and judged, as torch counts and judges it."""

    def turn(self) -> None:
        made, content = network(self.turns)
        key = self.upload(f"{self.name}-{self.turns}", content)
        stats = self._counted(key)
        assert stats["total_params"] == PARAMETERS, stats
        right = made(torch.tensor(INPUT)).argmax(1).tolist()
        labels = [right[0], (right[1] + 1) % 3]
        body = {
            "model_input": INPUT,
            "labels": labels,
            "options": {"uncertainty": {"output": "logits"}},
        }
        answer = self.server.ask("POST", f"/api/models/{key}/calibration/", json=body)
        while answer.status_code == 202:
            self.stop.wait(0.2)
            answer = self.server.ask("GET", answer.json()["url"])
        assert _good(answer).json()["accuracy"] == 0.5
        self.forget(key)
        self.turns += 1

    def _counted(self, key: str) -> dict[str, object]:
        while True:
            told = _good(self.server.ask("GET", f"/api/models/{key}/metadata/")).json()
            assert told["stats_state"] in {"pending", "done"}, told
            if told["stats_state"] == "done":
                return dict(told["stats"])
            self.stop.wait(0.2)
