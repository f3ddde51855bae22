"""Which container a file is, out of it into canonical form, and back into the one a client knows."""

import hashlib
import os
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path

from fl_server_ai.containers import npz, safetensors
from fl_server_ai.containers.canonical import Manifest, read_manifest
from fl_server_ai.containers.limits import Limits
from fl_server_core.exceptions import NotAvailable, TooLarge, UnknownContainer, Unusable

SAFETENSORS, NPZ = "safetensors", "npz"
READ_HERE = "send safetensors or .npz"


@dataclass(frozen=True)
class Extracted:
    """A canonical file: `digest` is its SHA-256 (hexadecimal), `rewritten` whether bytes had to be moved."""

    container: str
    manifest: Manifest
    digest: str
    size: int
    rewritten: bool


def sniff(path: Path) -> str:
    """The container by its first bytes; torch's own are known but not read yet (`NotAvailable`)."""
    with path.open("rb") as file:
        head = file.read(16)
    if head[:4] in {b"PK\x03\x04", b"PK\x05\x06"}:
        return _zip_kind(path)
    if head[8:9] == b"{":
        return SAFETENSORS
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05":
        raise NotAvailable(f"pickled and old torch files are not read; {READ_HERE}")
    raise UnknownContainer(f"these bytes are no container of weights; {READ_HERE}")


def _zip_kind(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()[:100_000]
    except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError, OSError):
        return NPZ  # its reader says what is wrong
    if any(name.endswith("/constants.pkl") for name in names):
        raise NotAvailable(f"TorchScript archives are not read yet; {READ_HERE}")
    if any(name.endswith(("/data.pkl", "/version")) for name in names):
        raise NotAvailable(f"files of torch.save are not read yet; {READ_HERE}")
    return NPZ


def extract(
    source: Path, target: Path, *, limits: Limits | None = None, sha256: str | None = None
) -> Extracted:
    """Bring any container into canonical form at `target`, a synced file. On an error `target` is not there.

    A file that is canonical already is moved, not copied, and `sha256`, its digest from the upload, is
    believed. Raises `UnknownContainer`, `NotAvailable`, `BadContainer` or `TooLarge`.
    """
    limits = limits or Limits()
    size = source.stat().st_size
    if size > limits.file_bytes:
        raise TooLarge(f"{size:,} bytes; {limits.file_bytes:,} are allowed")
    container = sniff(source)
    moved = container == SAFETENSORS and safetensors.is_canonical(source, limits)
    try:
        if moved:
            source.replace(target)
            _sync(target)
        elif container == SAFETENSORS:
            safetensors.extract(source, target, limits)
        else:
            npz.extract(source, target, limits)
        digest = sha256 if moved and sha256 else _digest(target)
        manifest = read_manifest(target, limits)
        return Extracted(container, manifest, digest, target.stat().st_size, not moved)
    except BaseException:
        target.unlink(missing_ok=True)
        raise


def write_back(container: str, canonical: Path, out: Path) -> None:
    """Write canonical weights to `out` in `container`; the same weights give the same bytes."""
    if container == SAFETENSORS:
        shutil.copyfile(canonical, out)
    elif container == NPZ:
        npz.write(canonical, out)
    else:
        raise Unusable(f"weights can't be given as {container!r}", code="NOT_REPRESENTABLE")


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
