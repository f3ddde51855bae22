"""Hostile files, each made by a few lines of code that say what is wrong with it.

`CORPUS` holds them by name, with the codes of the refusals that are right for each.

- `building.py`  pickle opcodes and zip records, so that they can lie; and the honest files to start from
- `pickles.py`   programs that call what no weights need; persistent ids
- `gadgets.py`   programs that look harmless; `readings.py` those that torch reads otherwise
- `structures.py`  programs without end or sense
- `archives.py`  the zip around them
- `tensors.py`   storages, shapes, strides, names
- `scripts.py`   TorchScript
- `exports.py`   programs of torch.export
- `headers.py`   safetensors
- `npz.py`       numpy's archives
- `watched.py`   a process that reads them all and records what else it does
- `armed.py`     a process that unpickles those that would create the marker
"""

from tests.ai.hostile import (
    archives,
    doubles,
    exports,
    gadgets,
    headers,
    npz,
    pickles,
    readings,
    scripts,
    structures,
    tensors,
)
from tests.ai.hostile.building import CORPUS, HONEST, MARKER, HostileFile

__all__ = [
    "CORPUS",
    "HONEST",
    "MARKER",
    "HostileFile",
    "archives",
    "doubles",
    "exports",
    "gadgets",
    "headers",
    "npz",
    "pickles",
    "readings",
    "scripts",
    "structures",
    "tensors",
]
