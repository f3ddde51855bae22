"""Weight files for the tests of strategies, and rounds of aggregations over them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from fl_server_ai.aggregation import STRATEGIES, UpdateMeta
from fl_server_ai.aggregation.engine import UpdateFile, aggregate
from fl_server_ai.aggregation.options import parse_options

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
        self,
        base: Any,
        updates: Sequence[Any],
        sizes: Sequence[int] = (),
        steps: Sequence[int] = (),
        **more: Any,
    ) -> Array:
        """One round of float64 vectors (or tensors) through files; the state goes on to the next."""
        self.round += 1
        files = [
            UpdateFile(
                self.write(f"{self.round}-{index:03}", as_tensor(update)),
                UpdateMeta(f"{index:03}", size, num_steps=steps[index] if steps else None),
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


def as_tensor(vector: Any) -> torch.Tensor:
    if isinstance(vector, torch.Tensor):
        return vector
    return torch.tensor(np.asarray(vector, dtype=np.float64))


def cloud(n: int, size: int = 60, seed: int = 3) -> Array:
    """n honest updates around the point 1."""
    return 1 + 0.1 * np.random.default_rng(seed).standard_normal((n, size))
