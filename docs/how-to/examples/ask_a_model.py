"""Upload a scripted network and ask it how sure it is: `python ask_a_model.py URL TOKEN`."""

import io
import json
import sys
import time

import httpx
import torch
from torch import nn

IMAGES = [[0.5, -1.0, 2.0, 0.0], [1.0, 1.0, -1.0, 3.0]]


class Network(nn.Module):
    """Two classes of four numbers; the dropout layer is what MC dropout switches on."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 2))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.layers(inputs)


def main(url: str, token: str) -> None:
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(Network()), file)
    headers = {"Authorization": f"Token {token}"}
    with httpx.Client(base_url=url, headers=headers, timeout=60) as http:
        form = {"name": "example", "description": "four numbers", "input_shape": ["None", "4"]}
        sent = http.post("/api/models/", data=form, files={"model_file": file.getvalue()})
        sent.raise_for_status()
        question = {
            "model_id": sent.json()["model_id"],
            "model_input": IMAGES,
            "uncertainty_method": "MC_DROPOUT",
            "options": {"uncertainty": {"N": 30, "seed": 1, "output": "logits"}},
        }
        answer = http.post("/api/inference/", json=question)
        while answer.status_code == 202:  # it takes longer: the model is loaded, or others wait
            time.sleep(1)
            answer = http.get(answer.json()["url"])
        answer.raise_for_status()
        print(json.dumps(answer.json()))


if __name__ == "__main__":
    main(*sys.argv[1:])
