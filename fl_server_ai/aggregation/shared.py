"""What clients get beside the weights: some of the strategy's state, in tensors named like the model's."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from fl_server_ai.aggregation.flat import float_runs, places
from fl_server_ai.aggregation.strategy import Strategy
from fl_server_ai.containers import TensorInfo, read_manifest
from fl_server_ai.containers.writing import read_blocks, write_canonical

POPULATION = "population"  # of how many participants the means in a state are
NUMPY = {"F32": "<f4", "F64": "<f8"}


def write_shared(
    *, state: Path, base: Path, out: Path, strategy: Strategy[object], population: int
) -> str:
    """Write `extra.<name>.<tensor>` for each float tensor of `strategy.shared`; SHA-256 of the new file at `out`.

    Means over all participants are made those of `population`; 0: unknown, they stay as they are.
    """
    manifest = read_manifest(state)
    vectors = {info.name: info for info in manifest.tensors}
    scale = rescaling(manifest.metadata, population)
    found: dict[str, tuple[TensorInfo, int, int, float]] = {}
    layout = []
    for name, block in strategy.shared.items():
        factor = scale if block in strategy.population_means else 1.0
        for index, run in enumerate(float_runs(read_manifest(base).tensors)):
            for tensor, vector, at, size in places(block, run, index):
                given = f"extra.{name}.{tensor.name}"
                layout.append((given, run.beside, tensor.shape))
                found[given] = (vectors[vector], at, size, factor)

    def blocks(name: str) -> Iterator[memoryview]:
        vector, at, size, factor = found[name]
        with state.open("rb", buffering=0) as file:
            for part in read_blocks(file, vector.offset + at, size):
                yield part if factor == 1.0 else _times(part, vector.dtype, factor)

    return write_canonical(out, layout, blocks)


def rescaling(metadata: Mapping[str, str], population: int) -> float:
    """What a mean that a state with such `metadata` holds is multiplied by; 1 where either number is unknown."""
    before = int(metadata.get(POPULATION, "0"))
    return before / population if before and population else 1.0


def _times(part: memoryview, dtype: str, factor: float) -> memoryview:
    numbers = np.frombuffer(part, NUMPY[dtype])
    scaled = (numbers.astype(np.float64) * factor).astype(numbers.dtype)
    return memoryview(scaled.tobytes())
