"""Weight files for the tests of strategies, and rounds of aggregations over them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from fl_server_ai.aggregation import STRATEGIES, RoundFacts, Strategy, UpdateMeta
from fl_server_ai.aggregation.engine import UpdateFile, aggregate
from fl_server_ai.aggregation.flat import float_runs
from fl_server_ai.aggregation.options import parse_options
from fl_server_ai.containers import read_manifest
from fl_server_ai.containers.writing import write_canonical

Array = np.ndarray[Any, Any]


class Lab:
    """A folder in which one strategy works, round after round, as a worker would call it."""

    def __init__(self, folder: Path, name: str, **options: Any) -> None:
        self.folder, self.name, self.options = folder, name, options
        self.state: Path | None = None
        self.round = 0

    def write(self, name: str, vector: Any) -> Path:
        tensor = vector if isinstance(vector, torch.Tensor) else torch.tensor(vector)
        path = self.folder / name
        save_file({"w": tensor}, path)
        return path

    def step(
        self, base: Any, updates: Sequence[Any], sizes: Sequence[int] = (), **more: Any
    ) -> Array:
        """One round of float64 vectors (or tensors) through files; the state goes on to the next."""
        self.round += 1
        files = [
            UpdateFile(
                self.write(f"{self.round}-{index:03}", as_tensor(update)),
                UpdateMeta(f"{index:03}", size),
            )
            for index, (update, size) in enumerate(
                zip(updates, sizes or [1] * len(updates), strict=True)
            )
        ]
        kind = STRATEGIES[self.name]
        out, state = self.folder / f"out-{self.round}", self.folder / f"state-{self.round}"
        aggregate(
            base=self.write(f"base-{self.round}", as_tensor(base)),
            updates=files,
            out=out,
            strategy=kind(parse_options(kind.Options, self.options)),
            state_in=self.state,
            state_out=state,
            device="cpu",
            **more,
        )
        self.state = state if state.exists() else None
        result: Array = load_file(out)["w"].double().numpy()
        return result


def furnished(
    strategy: Strategy[Any], updates: Sequence[UpdateFile], folder: Path
) -> list[UpdateFile]:
    """The updates with steps and neutral extras: what the strategy wants of its clients."""
    strategy.facts = RoundFacts(actor=min(file.meta.participant for file in updates))
    wanted = [extra for extra in strategy.extras() if extra.required]
    names = [extra.name for extra in wanted if extra.per_tensor]
    numbers = {extra.name: 1.0 for extra in wanted if not extra.per_tensor}
    beside = None
    if names:
        runs = float_runs(read_manifest(updates[0].path).tensors)
        beside = folder / "beside"
        layout = [
            (f"{name}.{index}", run.beside, (run.count,))
            for name in names
            for index, run in enumerate(runs)
        ]
        sizes = {name: shape[0] * (8 if dtype == "F64" else 4) for name, dtype, shape in layout}
        beside.unlink(missing_ok=True)
        write_canonical(beside, layout, lambda name: [bytes(sizes[name])])
    return [
        replace(file, meta=replace(file.meta, num_steps=3, extras=numbers), extras=beside)
        for file in updates
    ]


def as_tensor(vector: Any) -> torch.Tensor:
    if isinstance(vector, torch.Tensor):
        return vector
    return torch.tensor(np.asarray(vector, dtype=np.float64))


def cloud(n: int, size: int = 60, seed: int = 3) -> Array:
    """n honest updates around the point 1."""
    return 1 + 0.1 * np.random.default_rng(seed).standard_normal((n, size))
