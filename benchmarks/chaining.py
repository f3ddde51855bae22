"""FedDC (arXiv:2110.03469) beside FedAvg where every client has a handful of samples: accuracy, seed by seed.

python benchmarks/chaining.py [--seeds 5] [--mnist FILE]

No HTTP and no database: rounds of local training here, the server's own rule for what follows each of them (`step_after`), its own
draw of who goes on with whose model (`chain_drawn`) and its own aggregation engine. All clients of a round are calculated at
once, as a batch of matrices. One round is `steps` steps of plain gradient descent on all of a client's samples; every model that
moves is one upload and one download. MNIST is left out, with a line that says so, where there is no file of it.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import django
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from sklearn.datasets import make_classification
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("DJANGO_SETTINGS_MODULE", "fl_server.settings.test")
django.setup()

from fl_server_ai.aggregation import STRATEGIES, UpdateMeta  # noqa: E402
from fl_server_ai.aggregation.engine import UpdateFile, aggregate  # noqa: E402
from fl_server_ai.services.chaining import AGGREGATE, CHAIN, step_after  # noqa: E402
from fl_server_ai.services.training_options import TrainerOptions  # noqa: E402
from fl_server_core.services.chains import chain_drawn  # noqa: E402

MNIST = Path(__file__).resolve().parents[2] / "shared" / "data" / "mnist.npz"
TESTED = 4000
Weights = list[Tensor]  # (clients, inputs, outputs) and (clients, 1, outputs) in turn


@dataclass(frozen=True)
class Data:
    """Training data (clients, samples, features) and a common test set."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


@dataclass(frozen=True)
class Problem:
    """Where, how long and how often: `period` rounds between two averages."""

    name: str
    data: Callable[[int], Data]
    sizes: tuple[int, ...]
    rounds: int
    steps: int
    rate: float
    period: int


def synthetic(clients: int, samples: int, seed: int) -> Data:
    """Five classes of 100 features, of which 20 tell something: as in the paper."""
    count = clients * samples
    x, y = make_classification(
        count + TESTED, 100, n_informative=20, n_redundant=60, n_repeated=5, n_classes=5,
        n_clusters_per_class=1, random_state=seed,
    )  # fmt: skip
    x = (x - x.mean(0)) / x.std(0)
    inputs, labels = torch.tensor(x, dtype=torch.float32), torch.tensor(y)
    mine = inputs[:count].view(clients, samples, -1), labels[:count].view(clients, samples)
    return Data(*mine, inputs[count:], labels[count:])


def mnist(file: Path, clients: int, samples: int, seed: int) -> Data:
    """Another draw of training images for each seed; the first of the test images."""
    with np.load(file) as found:
        arrays = [found[name] for name in ("x_train", "y_train", "x_test", "y_test")]
    x, y, test_x, test_y = (torch.from_numpy(array) for array in arrays)
    chosen = np.random.default_rng(seed).choice(len(x), clients * samples, replace=False)
    mine = x[chosen].view(clients, samples, -1) / 255, y[chosen].view(clients, samples).long()
    return Data(*mine, test_x[:TESTED].view(TESTED, -1) / 255, test_y[:TESTED].long())


def initial(sizes: Sequence[int], clients: int, seed: int) -> Weights:
    """torch's usual random weights, the same for all clients."""
    torch.manual_seed(seed)
    weights: Weights = []
    for layer in (nn.Linear(*pair) for pair in pairwise(sizes)):
        weights += [layer.weight.detach().T, layer.bias.detach()[None]]
    return [one.expand(clients, *one.shape).clone() for one in weights]


def outputs(weights: Weights, x: Tensor) -> Tensor:
    for matrix, bias in zip(weights[:-2:2], weights[1:-2:2], strict=True):
        x = (x @ matrix + bias).relu()
    return x @ weights[-2] + weights[-1]


def trained(weights: Weights, data: Data, steps: int, rate: float) -> Weights:
    """Each client's model after so many steps on its own samples."""
    for _ in range(steps):
        for one in weights:
            one.requires_grad_()
        logits = outputs(weights, data.x).flatten(0, 1)
        losses = functional.cross_entropy(logits, data.y.flatten(), reduction="sum")
        slopes = torch.autograd.grad(losses / data.y.shape[1], weights)
        weights = [one.detach() - rate * slope for one, slope in zip(weights, slopes, strict=True)]
    return weights


def averaged(weights: Weights, samples: int, folder: Path) -> Weights:
    """What the server's FedAvg makes of them."""
    updates = []
    for client in range(len(weights[0])):
        path = folder / f"{client}.safetensors"
        save_file({f"w{n}": one[client].contiguous() for n, one in enumerate(weights)}, path)
        updates.append(UpdateFile(path, UpdateMeta(f"{client:04}", samples)))
    out = folder / "mean.safetensors"
    aggregate(base=None, updates=updates, out=out, strategy=STRATEGIES["FedAvg"](), threads=1)
    mean = load_file(out)
    return [mean[f"w{n}"].expand_as(one).clone() for n, one in enumerate(weights)]


def run(problem: Problem, seed: int, *, chained: bool, period: int, folder: Path) -> float:
    """Accuracy of the last average on the test set."""
    data = problem.data(seed)
    clients, samples = data.y.shape
    weights = initial(problem.sizes, clients, seed)
    options = TrainerOptions(daisy_chain_period=period if chained else 0)
    for number in range(problem.rounds):
        weights = trained(weights, data, problem.steps, problem.rate)
        step = step_after(options, round=number, target=problem.rounds)
        if chained and step == CHAIN:
            everybody = range(clients)
            pairs = [(client, client) for client in everybody]
            taken = chain_drawn(seed, number + 1, everybody, pairs, no_fixed_points=False)
            weights = [one[[taken[client] for client in everybody]] for one in weights]
        elif (step == AGGREGATE and chained) or (number + 1) % period == 0:
            weights = averaged(weights, samples, folder)
    guesses = outputs([one[0] for one in weights], data.test_x).argmax(1)
    return float((guesses == data.test_y).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--mnist", type=Path, default=MNIST, help="x_train, y_train, x_test, y_test"
    )
    arguments = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 140)
    torch.set_num_threads(1)
    problems = [
        Problem("synthetic, 50 clients of 10", lambda s: synthetic(50, 10, s), (100, 64, 5), 200, 5, 0.1, 50)
    ]  # fmt: skip
    if arguments.mnist.exists():
        problems.append(
            Problem("MNIST, 100 clients of 8", lambda s: mnist(arguments.mnist, 100, 8, s), (784, 64, 10), 60, 5, 0.1, 20)
        )  # fmt: skip
    else:
        console.print(f"no MNIST: there is no {arguments.mnist}; --mnist names the file")
    table = Table(
        "data",
        "method",
        "d",
        "b",
        "transfers a client",
        "accuracy",
        "beside FedAvg, b=1",
        "better in",
    )
    memory = Path("/dev/shm")  # noqa: S108 - the engine syncs each average, and none is kept
    with tempfile.TemporaryDirectory(dir=memory if memory.exists() else None) as folder:
        for problem in problems:
            reference: list[float] = []
            for chained, period in ((False, 1), (False, problem.period), (True, problem.period)):
                began = time.perf_counter()
                found = [
                    run(problem, seed, chained=chained, period=period, folder=Path(folder))
                    for seed in range(arguments.seeds)
                ]
                reference = reference or found
                gains = [100 * (a - b) for a, b in zip(found, reference, strict=True)]
                table.add_row(
                    problem.name,
                    "FedDC" if chained else "FedAvg",
                    "1" if chained else "",
                    str(period),
                    str(problem.rounds if chained else problem.rounds // period),
                    spread([100 * share for share in found]),
                    "" if found is reference else spread(gains, sign="+"),
                    "" if found is reference else f"{sum(g > 0 for g in gains)} of {len(gains)}",
                )
                print(f"{problem.name}: {time.perf_counter() - began:.0f} s", file=sys.stderr)
    console.print(table)


def spread(values: Sequence[float], sign: str = "") -> str:
    """Mean and standard deviation of percentages."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{sign}.2f} ± {deviation:.2f} %"


if __name__ == "__main__":
    main()
