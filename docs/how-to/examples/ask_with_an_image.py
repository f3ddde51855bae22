"""Upload a network with its preprocessing and ask it with a picture: `python ask_with_an_image.py URL TOKEN IMAGE`."""

import json
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

import fl_client

PIPELINE = {
    "steps": [
        {"step": "resize", "size": 36},
        {"step": "center_crop", "size": 32},
        {"step": "rgb"},
        {"step": "cast", "dtype": "float32", "scale": True},
        {"step": "normalize", "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
    ]
}


def main(url: str, token: str, image: str) -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)
    )
    with tempfile.TemporaryDirectory() as folder, fl_client.connect(url, token=token) as fl:
        program = Path(folder, "model.pt")
        torch.jit.save(torch.jit.script(network), program)
        model = fl.models.upload(
            name="example",
            description="pictures of 32 x 32",
            weights=program,
            input_shape=[None, 3, 32, 32],
            preprocessing=PIPELINE,
        )
        answer = fl.models.ask(model, image, options={"uncertainty": {"task": "regression"}})
    print(json.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
