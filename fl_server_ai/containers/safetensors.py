"""Safetensors files as clients send them: any order, metadata allowed, re-encoded where not canonical."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from fl_server_ai.containers.canonical import Manifest, canonical_header, read_manifest
from fl_server_ai.containers.container import CONTAINERS, Container
from fl_server_ai.containers.limits import Limits
from fl_server_ai.containers.writing import read_blocks, write_canonical


@CONTAINERS.register("safetensors")
class Safetensors(Container):
    name = "safetensors"

    def matches(self, head: bytes, path: Path) -> bool:
        return head[8:9] == b"{"

    def canonical(self, source: Path, limits: Limits) -> Manifest | None:
        manifest = read_manifest(source, limits)
        same = manifest.header_bytes == canonical_header(manifest.layout())[0]
        return manifest if same else None

    def extract(self, source: Path, target: Path, limits: Limits) -> str:
        manifest = read_manifest(source, limits)
        places = {tensor.name: (tensor.offset, tensor.nbytes) for tensor in manifest.tensors}
        with source.open("rb", buffering=0) as file:
            return write_canonical(
                target, manifest.layout(), lambda name: read_blocks(file, *places[name])
            )

    def metadata(self, source: Path, limits: Limits) -> Mapping[str, str]:
        return read_manifest(source, limits).metadata

    def write(self, canonical: Path, out: Path, template: Path | None = None) -> None:
        shutil.copyfile(canonical, out)
