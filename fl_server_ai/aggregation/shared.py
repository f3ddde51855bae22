"""What clients get beside the weights: some of the strategy's state, in tensors named like the model's."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from fl_server_ai.aggregation.flat import float_runs, places
from fl_server_ai.containers import TensorInfo, read_manifest
from fl_server_ai.containers.writing import read_blocks, write_canonical


def write_shared(*, state: Path, base: Path, out: Path, names: Mapping[str, str]) -> str:
    """Write `extra.<name>.<tensor>` for each float tensor; SHA-256 of the new file at `out`.

    `names` maps the name that clients know to that of the state block.
    """
    vectors = {info.name: info for info in read_manifest(state).tensors}
    found: dict[str, tuple[TensorInfo, int, int]] = {}
    layout = []
    for name, block in names.items():
        for index, run in enumerate(float_runs(read_manifest(base).tensors)):
            for tensor, vector, at, size in places(block, run, index):
                given = f"extra.{name}.{tensor.name}"
                layout.append((given, run.beside, tensor.shape))
                found[given] = (vectors[vector], at, size)

    def blocks(name: str) -> Iterator[memoryview]:
        vector, at, size = found[name]
        with state.open("rb", buffering=0) as file:
            yield from read_blocks(file, vector.offset + at, size)

    return write_canonical(out, layout, blocks)
