"""The small network that is trained, and the plain torch that trains it."""

import numpy as np
import torch
from torch import nn

from demo.data import Images, Labels

SEED = 0


def build() -> nn.Module:
    """64 pixels to ten classes through one hidden layer of 128: 9,610 parameters."""
    torch.manual_seed(SEED)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def train(module: nn.Module, x: Images, y: Labels, *, epochs: int, lr: float, seed: int) -> float:
    """Plain mini-batch SGD with momentum; returns the last epoch's mean loss."""
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
            losses.append(float(loss.detach()))
    return float(np.mean(losses))


def accuracy(module: nn.Module, x: Images, y: Labels) -> float:
    """Share of images that are told right."""
    module.eval()
    with torch.inference_mode():
        guesses = module(torch.from_numpy(x)).argmax(dim=1).numpy()
    return float((guesses == y).mean())
