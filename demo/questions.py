"""Asks the server's model about corrupted digits, by four methods, and how sure it is of each answer."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from demo.corruption import corrupted
from demo.processes import DemoFailed
from fl_client.connection import Connection
from fl_server_ai.uncertainty.ranking import Ranking, rank_errors

DRAWS = 30
LONGEST = 60.0  # seconds for one answer; the first one starts a process
PLAIN = (
    "NONE (entropy of its softmax)"  # the server tells no uncertainty: we make it of the outputs
)
ENTROPY = "predictive_entropy"


def ensemble(fl: Connection, models: list[str]) -> str:
    """A MEAN model of these, all alike."""
    body = {"name": "three of them", "description": "-", "type": "MEAN", "models": models}
    return str(fl.transport.json("POST", "models/", body=body)["model_id"])


def rankings(fl: Connection, model: str, mean: str, folder: Path) -> dict[str, Ranking]:
    """By method: accuracy for each share of the most certain digits, and the AUROC of error detection.

    Uncertainty is the predictive entropy everywhere, so the methods differ in their probabilities alone.
    """
    images, labels = corrupted()
    file = folder / "corrupted.npz"
    np.savez(file, images=images)
    truth = torch.from_numpy(labels)
    # NONE answers the index of the largest output; a regression's outputs come as they are.
    outputs = torch.tensor(ask(fl, model, "NONE", file, {"task": "regression"})["inference"])
    logs = outputs.double().log_softmax(1)
    found = {PLAIN: rank_errors(-(logs.exp() * logs).sum(1), logs.argmax(1) == truth)}
    asked = (
        (f"MC dropout ({DRAWS} runs)", model, "MC_DROPOUT"),
        (f"SWAG ({DRAWS} draws)", model, "SWAG"),
        ("ensemble (3 models)", mean, "ENSEMBLE"),
    )
    for name, subject, method in asked:
        options = {"output": "logits", "N": DRAWS, "seed": 0}
        answer = ask(fl, subject, method, file, options)
        doubt = torch.tensor(answer["uncertainty"][ENTROPY], dtype=torch.float64)
        found[name] = rank_errors(doubt, torch.tensor(answer["inference"]).argmax(1) == truth)
    return found


def ask(
    fl: Connection, model: str, method: str, file: Path, options: dict[str, Any]
) -> dict[str, Any]:
    """The server's answer, waited for."""
    form = [
        ("model_id", model),
        ("uncertainty_method", method),
        ("options", json.dumps({"uncertainty": options})),
        ("return_format", "json"),
    ]
    answer: dict[str, Any] = fl.transport.json(
        "POST", "inference/", form=form, files={"model_input": file}
    )
    give_up = time.monotonic() + LONGEST
    while "url" in answer:
        if time.monotonic() > give_up:
            raise DemoFailed(f"no answer by {method} in {LONGEST:.0f} s")
        time.sleep(0.1)
        answer = fl.transport.json("GET", f"inference/{answer['job_id']}/")
    return answer
