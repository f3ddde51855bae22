"""The two data sets of the checks, read from a folder outside the repository."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(
    os.environ.get("PAPER_DATA") or Path(__file__).resolve().parents[3].joinpath("shared", "data")
)
HEART, MNIST = "heart_disease.npz", "mnist.npz"
WANTED = f"""\
Nothing was run. The data are not part of this repository; put these files into one folder and name it: \
make papers PAPERS="--data FOLDER" (or PAPER_DATA=FOLDER).
  {HEART}  UCI's "Heart Disease" (CC BY 4.0), processed.*.data of four hospitals: X (740, 13) float32, not
                     normalised; y, 0 or 1; center, 0 to 3: Cleveland, Hungary, Switzerland, VA; split, 0 for training, 1
                     for testing, as FLamby makes it
  {MNIST}          MNIST in its original order: x_train (60000, 28, 28) and x_test (10000, 28, 28) in uint8, y_train, y_test"""
HOSPITALS = ("Cleveland", "Hungary", "Switzerland", "VA")


@dataclass(frozen=True)
class Part:
    """Inputs (n, features) in float32, and labels (n,)."""

    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Heart:
    """Each hospital's patients, standardised by its own training patients; `pooled` by those of all four."""

    train: list[Part]
    test: list[Part]
    pooled: Part


def missing(folder: Path, *names: str) -> str:
    """Why these files cannot be read, or nothing."""
    absent = [str(folder / name) for name in names if not (folder / name).is_file()]
    return f"there is no {' and no '.join(absent)}; --data names the folder" if absent else ""


def heart(folder: Path) -> Heart:
    """486 training and 254 test patients with 13 values each; labels are 0.0 and 1.0."""
    with np.load(folder / HEART) as found:
        x = torch.from_numpy(found["X"])
        y = torch.from_numpy(found["y"]).float()
        center, test = torch.from_numpy(found["center"]), torch.from_numpy(found["split"]) == 1
    whole = Heart([], [], Part(_standardised(x, ~test)[test], y[test]))
    for number in range(len(HOSPITALS)):
        here = center == number
        mine = _standardised(x[here], ~test[here])
        for parts, chosen in ((whole.train, ~test[here]), (whole.test, test[here])):
            parts.append(Part(mine[chosen], y[here][chosen]))
    return whole


def _standardised(x: Tensor, train: Tensor) -> Tensor:
    return (x - x[train].mean(0)) / (x[train].std(0) + 1e-9)


@dataclass(frozen=True)
class Mnist:
    """60,000 and 10,000 images of 784 bytes, in the original order."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor

    def part(self, chosen: np.ndarray) -> Part:
        """These training images, with pixels from 0 to 1."""
        rows = torch.from_numpy(chosen)
        return Part(self.x[rows].float() / 255, self.y[rows])

    def test(self, count: int = 10_000) -> Part:
        """The first so many test images."""
        return Part(self.test_x[:count].float() / 255, self.test_y[:count])


def mnist(folder: Path) -> Mnist:
    with np.load(folder / MNIST) as found:
        arrays = [torch.from_numpy(found[n]) for n in ("x_train", "y_train", "x_test", "y_test")]
    x, y, test_x, test_y = arrays
    return Mnist(x.flatten(1), y.long(), test_x.flatten(1), test_y.long())
