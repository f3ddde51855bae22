"""How far each update went, and how well its direction agrees with the others'.

With d_k = update_k - base and u_k = d_k / |d_k| the rule is cos_k = u_k . m_k / |m_k|, m_k the mean of all u_j but u_k.
FLTrust (arXiv:2012.13995) scores updates by their cosine with a direction that the server trusts, all scaled to one
length; there is no such direction here, so that of the others stands in. All of it follows from the inner products.
"""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from fl_server_ai.aggregation.blocks import FLOATS, UpdateFile
from fl_server_ai.aggregation.device import single_threaded_torch, thread_count
from fl_server_ai.aggregation.files import Files
from fl_server_ai.aggregation.gram import inner_products

FEWEST = 3  # of two that disagree nobody can say which is the outlier


def products(base: Path, updates: Sequence[UpdateFile], threads: int | None = None) -> Tensor:
    """(n, n) float64: inner products of (update - base) over all float numbers; memory does not grow with the model."""
    with single_threaded_torch(), ExitStack() as stack:
        files = Files(stack, base, updates, rebase=False)
        floats = [run for run in files.layout.runs if run.dtype in FLOATS]
        if files.base is None or not floats:
            return torch.zeros((len(updates), len(updates)), dtype=torch.float64)
        cpu = torch.device("cpu")
        return inner_products(files.base, files.sources, cpu, floats, thread_count(threads))


def norms(gram: Tensor) -> list[float]:
    """The Euclidean norm of each (update - base); infinity where its square overflows."""
    return [float(one) for one in gram.diagonal().sqrt().nan_to_num(nan=math.inf, posinf=math.inf)]


def cosines(gram: Tensor) -> list[float | None]:
    """Of each update with the sum of the others' directions, each of length 1, so that no one outweighs the rest.

    None for what has no direction (no change, or an overflow), and for all if fewer than three have one.
    """
    lengths = gram.diagonal().sqrt()
    able = [k for k, one in enumerate(lengths.tolist()) if math.isfinite(one) and one > 0]
    found: list[float | None] = [None] * len(lengths)
    if len(able) < FEWEST:
        return found
    some = lengths[able]
    unit = gram[able][:, able] / some[:, None] / some[None, :]
    unit.fill_diagonal_(1.0)
    along = unit.sum(dim=1)
    rest = (along.sum() - 2 * along + 1).clamp(min=0).sqrt()
    for index, dot, length in zip(able, (along - 1).tolist(), rest.tolist(), strict=True):
        found[index] = max(-1.0, min(1.0, dot / length)) if length > 1e-9 else 0.0
    return found
