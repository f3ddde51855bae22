"""Updates with indices are read in blocks: what is in memory does not grow with them."""

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fl_server_ai.containers import TensorInfo
from fl_server_ai.received.coded import INDICES, Coded
from fl_server_ai.received.form import Form
from fl_server_ai.received.numbers import BLOCK

SENT, COUNT = 1_000_000, 3_000_000


@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "not aligned"])
@pytest.mark.parametrize("dtype", INDICES)
def test_a_sparse_tensor_is_placed_block_by_block(tmp_path: Path, dtype: str, shift: int) -> None:
    draw = np.random.default_rng(1)
    index = np.sort(draw.choice(COUNT, SENT, replace=False)).astype(INDICES[dtype])
    numbers = draw.standard_normal(SENT, np.float32)
    path = tmp_path / "update"
    path.write_bytes(bytes(shift) + index.tobytes() + numbers.tobytes())
    beside = TensorInfo("extra.enc.index.w", dtype, (SENT,), shift, index.nbytes)
    info = TensorInfo("w", "F32", (SENT,), shift + index.nbytes, numbers.nbytes)
    wanted = TensorInfo("w", "F32", (COUNT,), 0, 4 * COUNT)
    found: Any = np.zeros(COUNT, np.float32)

    tracemalloc.start()
    coded = Coded(path, Form(encoding="topk"), wanted, info, {"index.w": beside})
    for start, (places, values) in zip(range(0, COUNT, BLOCK), coded.scattered(), strict=True):
        found[start + places] = values
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    whole = np.zeros(COUNT, np.float32)
    whole[index] = numbers
    np.testing.assert_array_equal(found, whole)
    assert peak < 4 * 8 * BLOCK < 8 * SENT
