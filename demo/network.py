"""The small network that is trained, and the plain torch that trains it."""

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from demo.data import Images, Labels


def build(seed: int = 0) -> nn.Module:
    """64 pixels to ten classes through one hidden layer of 128: 9,610 parameters."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 10))


def save_program(path: Path, seed: int) -> Path:
    """The network as TorchScript, which a server can run without any code of ours; the path again."""
    with warnings.catch_warnings(action="ignore"):  # TorchScript is old, and what torch has
        torch.jit.save(torch.jit.script(build(seed)), path)  # type: ignore[no-untyped-call]
    return path


def train(
    module: nn.Module,
    x: Images,
    y: Labels,
    *,
    epochs: int,
    lr: float,
    seed: int,
    after_step: Callable[[], None] = lambda: None,
) -> float:
    """Plain mini-batch SGD with momentum; returns the last epoch's mean loss."""
    torch.manual_seed(seed)  # for dropout
    inputs, labels = torch.from_numpy(x), torch.from_numpy(y)
    optimizer = torch.optim.SGD(module.parameters(), lr=lr, momentum=0.9)
    rng = np.random.default_rng(seed)
    module.train()
    losses: list[float] = []
    for _ in range(epochs):
        losses = []
        for batch in np.array_split(rng.permutation(len(y)), max(1, len(y) // 16)):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(module(inputs[batch]), labels[batch])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            after_step()
            losses.append(float(loss.detach()))
    return float(np.mean(losses))


def accuracy(module: nn.Module, x: Images, y: Labels) -> float:
    """Share of images that are told right."""
    module.eval()
    with torch.inference_mode():
        guesses = module(torch.from_numpy(x)).argmax(dim=1).numpy()
    return float((guesses == y).mean())
