"""Sites whose optima differ: the strategies against drift end where the common optimum is, FedAvg does not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save

from fl_client import Context, Scaffold
from fl_client.work import extra_tensors
from fl_server_ai.services.updates import update_submit
from fl_server_core.storage import local_path
from tests.scenes import Scene, scene, staged, weights

pytestmark = pytest.mark.django_db
LR, STEPS, ROUNDS = 0.1, 10, 14
# F_k(w) = a_k / 2 (w - t_k)^2
SITES = {"ada": (4.0, 1.0), "grace": (1.0, -2.0)}
OPTIMUM = sum(a * t for a, t in SITES.values()) / sum(a for a, _ in SITES.values())
Arrays = dict[str, np.ndarray]
Train = Callable[[str, Arrays, Context], tuple[Arrays, dict[str, Any]]]


def floats(arrays: Arrays) -> Arrays:
    return {name: value for name, value in arrays.items() if value.dtype.kind == "f"}


def descend(site: str, start: Arrays, push: Callable[[str, np.ndarray], Any]) -> Arrays:
    a, t = SITES[site]
    end = {name: value.copy() for name, value in start.items()}
    for _ in range(STEPS):
        for name in floats(end):
            end[name] = end[name] - np.float32(LR) * (a * (end[name] - t) + push(name, end[name]))
    return end


def fedavg(site: str, start: Arrays, context: Context) -> tuple[Arrays, dict[str, Any]]:
    return descend(site, start, lambda *_: 0.0), {}


def scaffold(site: str, start: Arrays, context: Context) -> tuple[Arrays, dict[str, Any]]:
    ours = Scaffold(context, start)
    end = descend(site, start, lambda name, _: ours.correction[name])
    return end, {"scaffold.dc": ours.finish(start, end, LR * STEPS)}


def feddyn() -> Train:
    g: dict[str, Arrays] = {}

    def train(site: str, start: Arrays, context: Context) -> tuple[Arrays, dict[str, Any]]:
        mine = g.setdefault(site, {name: value * 0 for name, value in floats(start).items()})
        alpha = 1.0
        end = descend(site, start, lambda n, w: alpha * (w - start[n]) - mine[n])
        for name in mine:
            mine[name] = mine[name] - alpha * (end[name] - start[name])
        return end, {}

    return train


def distance(folder: Path, method: str, train: Train, **options: Any) -> float:
    """How far the model is from the common optimum in the end."""
    running = scene(*SITES, method=method, rounds=ROUNDS, skip_model_tests=True, **options)
    for number in range(ROUNDS):
        version = running.now.model.weights
        for site in SITES:
            context = Context(
                {"round": number}, lambda _: {}, extras=shared(version), folder=folder / site
            )
            end, extras = train(site, running.current() if number else weights(0.0), context)
            submit(running, site, number, end | extra_tensors(extras))
        running.work()
    return float(np.abs(running.current()["layer.bias"] - OPTIMUM).max())


def shared(version: Any) -> dict[str, Arrays]:
    if version.shared is None:
        return {}
    with local_path(version.shared) as path:
        found = load(path.read_bytes())
    return {"scaffold.c": {name.split(".", 3)[3]: value for name, value in found.items()}}


def submit(running: Scene, site: str, number: int, tensors: Arrays) -> None:
    update_submit(
        model_id=running.training.model_id,
        owner=running.sites[site],
        round=number,
        sample_size=1,
        file=staged(save(tensors)),
        sha256=None,
        metrics={},
    )


def test_fedavg_stays_away_from_the_optimum(tmp_path: Path) -> None:
    assert distance(tmp_path, "FedAvg", fedavg) > 0.2


def test_scaffold_gets_there(tmp_path: Path) -> None:
    assert distance(tmp_path, "SCAFFOLD", scaffold) < 0.05


def test_feddyn_gets_there(tmp_path: Path) -> None:
    assert distance(tmp_path, "FedDyn", feddyn(), alpha=1.0) < 0.05
