"""From a SWAG round's stored deviations to the round's own, in a file: no tensor has to fit into memory."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from fl_server_ai.containers import read_manifest
from fl_server_ai.containers.writing import write_canonical
from fl_server_ai.sandbox.tensors import NUMPY
from fl_server_ai.uncertainty.deviations import Client, LowRank
from fl_server_core.models import Blob, SwagMoments
from fl_server_core.services.blobs import blob_store
from fl_server_core.storage import local_path, staging_path

Arrays = dict[str, np.ndarray[Any, Any]]


def combine_deviations(
    sent: Sequence[SwagMoments], *, rank: int, variance: str
) -> tuple[Blob | None, list[str]]:
    """The unsaved blob of the combined deviations (float32), and what people should know about them.

    None if nobody sent any. Who sent none counts with his mean alone.
    """
    if rank < 2:
        return None, []
    senders = sum(one.deviations is not None for one in sent)
    notes = []
    if senders < len(sent):
        notes.append(
            f"SWAG: {len(sent) - senders} of {len(sent)} participants sent no deviations; "
            + ("the low-rank part describes the others" if senders else "draws are diagonal")
        )
    if not senders:
        return None, notes
    target = staging_path(".deviations")
    try:
        with ExitStack() as stack:
            clients = [_client(one, stack) for one in sent]
            second = sent[0].second
            assert second is not None  # noqa: S101 - only moments with files are combined
            shapes = {
                info.name: info.shape
                for info in read_manifest(stack.enter_context(local_path(second))).tensors
            }
            low_rank = LowRank(clients, list(shapes), rank=rank, variance=variance)
            digest = write_canonical(
                target,
                [(name, "F32", (low_rank.columns, *shape)) for name, shape in shapes.items()],
                lambda name: _columns(low_rank, name, clients[0].mean[name].shape[0]),
            )
        if low_rank.given > low_rank.columns:
            notes.append(
                f"SWAG: {low_rank.columns} of {low_rank.given} columns of deviations kept, "
                f"{low_rank.kept:.1%} of their spread"
            )
        return blob_store(source=target, digest=digest, size=target.stat().st_size), notes
    finally:
        target.unlink(missing_ok=True)


def _client(one: SwagMoments, stack: ExitStack) -> Client:
    assert one.first is not None  # noqa: S101
    mean = {name: array.reshape(-1) for name, array in _mapped(one.first, stack).items()}
    columns = None
    if one.deviations is not None:
        found = _mapped(one.deviations, stack)
        columns = {n: array.reshape(len(array), array[0].size) for n, array in found.items()}
    return Client(float(one.sample_size), mean, columns)


def _mapped(blob: Blob, stack: ExitStack) -> Arrays:
    """A stored file's tensors, read by the system where they are looked at."""
    path = stack.enter_context(local_path(blob))
    return {
        info.name: np.memmap(path, NUMPY[info.dtype], "r", info.offset, info.shape)
        if info.nbytes
        else np.empty(info.shape, NUMPY[info.dtype])
        for info in read_manifest(path).tensors
        if info.dtype in NUMPY
    }


def _columns(low_rank: LowRank, name: str, size: int) -> Iterator[bytes]:
    """One tensor's columns one after the other; they are made side by side, in a scratch file."""
    if not size:
        return
    scratch = staging_path(".scratch")
    try:
        made = np.memmap(scratch, "<f4", "w+", shape=(low_rank.columns, size))
        for start, block in low_rank.blocks(name):
            made[:, start : start + block.shape[1]] = block
        for column in made:
            for start in range(0, size, 2**20):
                yield column[start : start + 2**20].tobytes()
    finally:
        scratch.unlink(missing_ok=True)
