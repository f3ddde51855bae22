"""Safetensors files as clients send them: any order, metadata allowed, re-encoded where not canonical."""

from pathlib import Path

from fl_server_ai.containers.canonical import canonical_header, read_manifest
from fl_server_ai.containers.limits import Limits
from fl_server_ai.containers.writing import CanonicalWriter, copy_range


def is_canonical(source: Path, limits: Limits) -> bool:
    """Whether the file is already, byte for byte, what would be written for it."""
    manifest = read_manifest(source, limits)
    return manifest.header_bytes == canonical_header(manifest.layout())[0]


def extract(source: Path, target: Path, limits: Limits) -> None:
    """Write the file's tensors to `target` in canonical form, in constant memory."""
    manifest = read_manifest(source, limits)
    with source.open("rb") as file, CanonicalWriter(target, manifest.layout()) as writer:
        for tensor in manifest.tensors:
            writer.write(tensor.name, copy_range(file, tensor.offset, tensor.nbytes))
