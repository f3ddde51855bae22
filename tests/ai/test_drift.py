"""Sites whose optima differ: the strategies against drift end where the common optimum is, FedAvg does not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save

from fl_client import Context, Scaffold
from fl_client.work import extra_tensors
from fl_server_ai.services.tasks import task_next
from fl_server_ai.services.trainings import training_clients_remove, training_create, training_start
from fl_server_ai.services.updates import update_submit
from fl_server_core.services.trainings import training_add_clients
from fl_server_core.storage import local_path
from tests.scenes import Scene, person, scene, staged, weights

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


# --- who is in, and for how long --------------------------------------------------------------

# All sites have F(w) = (w - 3)^2 / 2. One step with rate 1 goes from anywhere to 3 - (c - c_k).


def answered(running: Scene, folder: Path, *sites: str, end: float | None = None) -> float:
    """Each of them makes that step, or goes to `end` with rate 2; the model that is made of it."""
    for site in sites:
        task = task_next(user=running.sites[site])["task"]
        version = running.now.model.weights
        own = folder / task["training"] / site  # as the SDK does it
        context = Context(task, lambda _: {}, extras=shared(version), folder=own)
        start = running.current()
        ours = Scaffold(context, start)
        made = {n: start[n] - (start[n] - 3 + push) for n, push in ours.correction.items()}
        rate = 1.0
        if end is not None:
            made, rate = floats(weights(end)), 2.0
        changes = ours.finish(start, made, rate)
        made["steps"] = start["steps"]
        submit(running, site, task["round"], made | extra_tensors({"scaffold.dc": changes}))
    return value(running) if running.work() else float("nan")


def value(running: Scene) -> float:
    return float(running.current()["layer.bias"][0])


def alone(**options: Any) -> Scene:
    running = scene("ada", method="SCAFFOLD", rounds=9, **options)
    running.sites["grace"] = person("grace", client=True)
    return running


def join(running: Scene, *sites: str) -> None:
    ids = [running.sites[site].pk for site in sites]
    training_add_clients(training=running.training, user=running.actor, clients=ids)


def test_who_joins_a_round_gets_the_mean_of_all_and_moves_no_optimum(tmp_path: Path) -> None:
    running = alone(skip_model_tests=True)
    join(running, "grace")
    assert answered(running, tmp_path, "ada", end=2.0) == 2.0  # c_1 = (0 - 2) / 2 = -1

    told = shared(running.now.model.weights)["scaffold.c"]

    assert told["layer.bias"].tolist() == [-0.5] * 3
    assert answered(running, tmp_path, "ada", "grace") == 3.0  # 3.5 with the c of ada alone


def test_who_joins_between_two_rounds_moves_no_optimum_either(tmp_path: Path) -> None:
    running = alone()
    answered(running, tmp_path, "ada", end=2.0)
    join(running, "grace")
    running.report("ada", {"loss": 1.0})
    running.work()

    made = [answered(running, tmp_path, "ada", "grace")]
    for site in ("ada", "grace"):
        running.report(site, {"loss": 1.0})
    running.work()
    made.append(answered(running, tmp_path, "ada", "grace"))

    assert made == [3.5, 3.0]  # what both were told was ada's alone, what the server keeps is not


def test_what_a_site_that_has_left_contributed_stays_in_the_sum(tmp_path: Path) -> None:
    running = alone(skip_model_tests=True)
    join(running, "grace")
    answered(running, tmp_path, "ada", end=2.0)  # c_1 = -1
    answered(running, tmp_path, "ada", "grace")  # from 2, where both have the gradient -1, to 3
    grace = running.sites["grace"]

    training_clients_remove(training=running.training, user=running.actor, clients=[grace.pk])

    # The others' gradients and the last of hers cancel: w - 3 - 1 = 0; once told what that sum is of one site.
    assert [answered(running, tmp_path, "ada") for _ in range(3)] == [3.0, 4.0, 4.0]


def test_a_second_training_of_the_model_has_the_same_optimum(tmp_path: Path) -> None:
    running = scene("ada", method="SCAFFOLD", rounds=1, skip_model_tests=True)
    answered(running, tmp_path, "ada", end=2.0)
    second = training_create(
        actor=running.actor,
        model=running.now.model,
        target_num_updates=2,
        aggregation_method="SCAFFOLD",
        options={"skip_model_tests": True, "reset_state": "session"},
        clients=[running.sites["ada"].pk],
    )
    training_start(training=second, user=running.actor)
    running.training = second

    assert answered(running, tmp_path, "ada") == 3.0  # 4 with the c of the first
