"""A few tensors as one canonical safetensors byte string and back, without torch: inputs and answers."""

import hashlib
import io
import os
from collections.abc import Sequence

from fl_server_ai.containers import Limits, canonical_header
from fl_server_ai.containers.canonical import parse
from fl_server_ai.sandbox.tensors import RawTensor
from fl_server_core.models import Blob
from fl_server_core.services.blobs import blob_store
from fl_server_core.storage import local_path, staging_path

INLINE = 64 * 2**10  # bytes that a row may hold; more lies in a file


def packed(tensors: Sequence[RawTensor]) -> bytes:
    """The file's bytes; names must differ."""
    by_name = {tensor.name: tensor for tensor in tensors}
    header, infos = canonical_header((t.name, t.dtype, t.shape) for t in tensors)
    return b"".join([header, *(bytes(by_name[info.name].data) for info in infos)])


def unpacked(data: bytes) -> dict[str, RawTensor]:
    """The tensors by name, over the bytes given."""
    view = memoryview(data)
    manifest = parse(io.BytesIO(data), len(data), Limits())
    return {
        info.name: RawTensor(
            info.dtype, info.shape, view[info.offset : info.offset + info.nbytes], info.name
        )
        for info in manifest.tensors
    }


def put(data: bytes, *, synced: bool = True) -> tuple[bytes | None, Blob | None]:
    """What a row is to hold: the bytes, or the unsaved blob of a file with them."""
    if len(data) <= INLINE:
        return data, None
    return None, stored(data, synced=synced)


def stored(data: bytes, *, synced: bool = True) -> Blob:
    """An unsaved blob of a file with these bytes."""
    path = staging_path(".safetensors")
    try:
        with path.open("xb") as file:
            file.write(data)
            if synced:
                file.flush()
                os.fsync(file.fileno())
        digest = hashlib.sha256(data).hexdigest()
        return blob_store(source=path, digest=digest, size=len(data), synced=synced)
    finally:
        path.unlink(missing_ok=True)


def got(data: bytes | memoryview | None, file: Blob | None) -> bytes:
    """What `put` stored."""
    if file is None:
        return bytes(data or b"")
    with local_path(file) as path:
        return path.read_bytes()
