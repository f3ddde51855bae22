"""The tensors of a canonical file by name, none of them in memory until it is asked for."""

from collections.abc import Container, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

from safetensors import safe_open
from torch import Tensor


class Stored(Mapping[str, Tensor]):
    """Each read anew when it is asked for; `stack` closes the file. Only the names in `among`, if given."""

    def __init__(self, path: Path, stack: ExitStack, among: Container[str] | None = None) -> None:
        self._file = stack.enter_context(safe_open(path, "pt"))
        names: list[str] = list(self._file.keys())
        self._names = [name for name in names if among is None or name in among]

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
