"""The peers' side, run by the Python of their virtual environment: their public functions on numbers in memory.

`benchmarks/combining/serve.py` says how it is asked.
"""

import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from benchmarks.combining.inputs import Level, read_model, updates
from benchmarks.combining.serve import Answer, serve, timed

Models = list[np.ndarray]
BETA = 0.2


def flwr_rules() -> dict[str, Callable[[Models], Any]]:
    from flwr.server.strategy import aggregate as rules

    def given(models: Models) -> Any:
        return [([model], 100 + index) for index, model in enumerate(models)]

    return {
        "FedAvg": lambda models: rules.aggregate(given(models))[0],
        "FedMedian": lambda models: rules.aggregate_median(given(models))[0],
        "TrimmedMean": lambda models: rules.aggregate_trimmed_avg(given(models), BETA)[0],
        "Krum": lambda models: rules.aggregate_krum(given(models), (len(models) - 3) // 2, 0)[0],
    }


def nvflare_mean(models: list[Any]) -> Any:
    from nvflare.app_common.aggregators.weighted_aggregation_helper import (
        WeightedAggregationHelper,
    )

    helper = WeightedAggregationHelper()
    for index, model in enumerate(models):
        helper.add({"w": model}, float(100 + index), str(index), 0)
    return helper.get_result()["w"]


def nvflare_torch() -> Callable[[Models], Any]:
    import torch

    torch.ones(9).add_(torch.ones(9), alpha=2)
    return lambda models: nvflare_mean([torch.from_numpy(model) for model in models]).numpy()


def decoders(model: np.ndarray) -> dict[str, Callable[[], Any]]:
    """What turns one update that has arrived into the arrays above."""
    from flwr.common import ndarrays_to_parameters, parameters_to_ndarrays
    from nvflare.app_common.decomposers import numpy_decomposers
    from nvflare.fuel.utils import fobs

    numpy_decomposers.register()
    message, parameters = fobs.dumps({"w": model}), ndarrays_to_parameters([model])
    found = {
        "flwr": lambda: parameters_to_ndarrays(parameters),
        "nvflare numpy": lambda: fobs.loads(message),
    }
    try:
        import torch
        from safetensors.torch import load, save
    except ImportError:
        return found
    # Its torch decomposer writes safetensors; that part alone is timed, which favours it.
    archive = save({"w": torch.from_numpy(model)})
    return found | {"nvflare torch": lambda: load(archive)}


class Peers:
    """The loaded models, and what can be done with them."""

    def __init__(self) -> None:
        self.models: Models = []
        self.rules = {("flwr", rule): work for rule, work in flwr_rules().items()}
        self.rules["nvflare numpy", "FedAvg"] = nvflare_mean
        try:
            self.rules["nvflare torch", "FedAvg"] = nvflare_torch()
        except ImportError as error:
            print(f"nvflare's torch helper is left out: {error}", file=sys.stderr)
        warm = [np.full(64, float(k), dtype=np.float32) for k in range(5)]
        for work in self.rules.values():
            work(warm)

    def about(self) -> Answer:
        known = {name: version(name) for name in ("flwr", "nvflare", "numpy")}
        return {"versions": known, "rules": [list(key) for key in self.rules]}

    def load(self, folder: str, n: int) -> Answer:
        self.models = [read_model(path) for path in updates(Path(folder), n)]
        return {}

    def decode(self) -> Answer:
        """Seconds for one update, of each peer."""
        found = {}
        for peer, work in decoders(self.models[0]).items():
            took = []
            for _ in range(4):
                start = time.perf_counter()
                work()
                took.append(time.perf_counter() - start)
            found[peer] = median(took[1:])
        return found

    def combine(self, peer: str, rule: str, out: str | None = None) -> Answer:
        """Times and extra bytes; how far the result is `off` from the file `out`, if that is given."""
        level = Level()
        result, figures = timed(lambda: self.rules[peer, rule](self.models))
        figures["extra"] = level.extra()
        if out is not None:
            figures["off"] = float(np.abs(result - read_model(Path(out))).max())
        return figures


def main() -> None:
    peers = Peers()
    names = ("about", "load", "decode", "combine")
    serve({name: getattr(peers, name) for name in names})


if __name__ == "__main__":
    main()
