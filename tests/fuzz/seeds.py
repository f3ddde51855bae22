"""Honest files to begin with, as `target.check` takes them: a byte for the part, then the part."""

import io
import warnings
import zipfile

import numpy as np
import safetensors.numpy
import torch
from torch import nn

from tests.fuzz.target import CODE, SCRIPT

WHOLE, PICKLE, SCRIPT_PICKLE, SCRIPT_CODE, HEADER = range(5)


def seeds() -> list[bytes]:
    """Small files of every container, and their parts."""
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    saved = [_saved(module.state_dict()), _saved(module), _saved([torch.ones(2), torch.zeros(1)])]
    saved.append(_saved({"t": torch.ones(2, 3).T, "u": torch.ones(2, dtype=torch.uint16)}))
    script = _scripted(module)
    arrays = {"w": np.ones((2, 2), np.float32), "n": np.array(3)}
    npz = io.BytesIO()
    np.savez(npz, **arrays)
    tensors = safetensors.numpy.save(arrays)
    header = tensors[8 : 8 + int.from_bytes(tensors[:8], "little")]
    found = [(WHOLE, data) for data in [*saved, script, npz.getvalue(), tensors]]
    found += [(PICKLE, _entry(data, "data.pkl")) for data in saved]
    found += [(SCRIPT_PICKLE, SCRIPT), (SCRIPT_PICKLE, _entry(script, "data.pkl"))]
    found += [(SCRIPT_CODE, CODE), (HEADER, header)]
    return [bytes([kind]) + data for kind, data in found]


def _saved(thing: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    return buffer.getvalue()


def _scripted(module: nn.Module) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):
        torch.jit.save(torch.jit.script(module), buffer)
    return buffer.getvalue()


def _entry(data: bytes, name: str) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return next(archive.read(entry) for entry in archive.namelist() if entry.endswith(name))
