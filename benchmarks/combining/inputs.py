"""The files that all sides combine, and how much memory combining them takes."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

PREFIX = 8  # bytes of the header's length


def write_model(path: Path, numbers: np.ndarray) -> None:
    """A canonical safetensors file with one float32 tensor `w`."""
    shape = [numbers.size]
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, numbers.nbytes]}
    header = json.dumps({"w": entry}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(PREFIX, "little") + header)
        file.write(numbers.data)


def read_model(path: Path) -> np.ndarray:
    """The numbers of such a file, in memory of their own."""
    with path.open("rb") as file:
        file.seek(PREFIX + int.from_bytes(file.read(PREFIX), "little"))
        return np.fromfile(file, dtype=np.float32)


def make_inputs(folder: Path, n: int, p: int, tell: Callable[[], None]) -> None:
    """`base` and the updates 0 to n - 1, each a step of one from the base in every coordinate."""
    generator = np.random.default_rng(p)
    base = generator.standard_normal(p, dtype=np.float32)
    write_model(folder / "base", base)
    for index in range(n):
        update = generator.standard_normal(p, dtype=np.float32)
        update += base
        write_model(folder / str(index), update)
        tell()


def updates(folder: Path, n: int) -> Iterable[Path]:
    return (folder / str(index) for index in range(n))


def available() -> float:
    """Bytes that the machine can give without swapping, the page cache included."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(1024.0 * int(line.split()[1]) for line in lines if "MemAvailable" in line)


class Level:
    """What this process holds: its peak since the level was taken."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        self.start = self._read("VmRSS")

    def extra(self) -> float:
        return self._read("VmHWM") - self.start

    @staticmethod
    def _read(field: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith(field))
