"""A question to a model over HTTP, and what torch answers itself."""

import io
import time
import uuid
import warnings
from typing import Any

import httpx
import torch
from torch import nn

INPUT = [[0.5, -1.0, 2.0, 0.0], [1.0, 1.0, -1.0, 3.0]]


def asked(base: str, verify: Any = True) -> tuple[list[int], list[int]]:
    """Register, upload a scripted network, ask it; the server's answer and torch's."""
    torch.manual_seed(3)
    network = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    file = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):
        torch.jit.save(torch.jit.script(network), file)
    with httpx.Client(base_url=base, verify=verify, timeout=60) as http:
        person = {"username": f"asks-{uuid.uuid4().hex[:8]}", "password": "a long pass phrase"}
        made = http.post("/api/users/", json={**person, "actor": True})
        http.headers["Authorization"] = f"Token {made.json()['token']}"
        body = {"name": "net", "description": "-"}
        sent = http.post("/api/models/", data=body, files={"model_file": file.getvalue()})
        question = {"model_id": sent.json()["model_id"], "model_input": INPUT}
        answer = http.post("/api/inference/", json=question)
        while answer.status_code == 202:
            url = answer.json()["url"]
            time.sleep(0.05)
            answer = http.get(url)
        assert answer.status_code == 200, answer.text
    return answer.json()["inference"], network(torch.tensor(INPUT)).argmax(1).tolist()
