"""Which container a file is, out of it into canonical form, and back into the one a client knows."""

import errno
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fl_server_ai.containers.canonical import Manifest, read_manifest
from fl_server_ai.containers.container import CONTAINERS, Ties
from fl_server_ai.containers.limits import Limits
from fl_server_ai.containers.unread import AGAIN, DAMAGED, torch_kind
from fl_server_core.exceptions import BadContainer, TooLarge, UnknownContainer, Unusable

HEAD = 256  # bytes that a container is known by
READ_HERE = "safetensors, .npz, torch.save, TorchScript and torch.export archives are read"


@dataclass(frozen=True)
class Extracted:
    """A canonical file: `digest` is its SHA-256 (hexadecimal), `rewritten` whether bytes had to be moved.

    `metadata` is what the container said of itself; the canonical file has none.
    """

    container: str
    manifest: Manifest
    digest: str
    size: int
    rewritten: bool
    metadata: Mapping[str, str] = field(default_factory=dict)


def sniff(path: Path) -> str:
    """The container's name by its first bytes. Raises `UnknownContainer`, or `BadContainer` for a ruin."""
    with path.open("rb") as file:
        head = file.read(HEAD)
    for name in CONTAINERS:
        if CONTAINERS[name]().matches(head, path):
            return name
    if not head:
        raise UnknownContainer(f"the file is empty; {READ_HERE}")
    kind = torch_kind(head, path)
    if kind == DAMAGED:
        raise BadContainer(f"this is {kind}: it is cut off, or something follows its end")
    if kind:
        raise UnknownContainer(f"this is {kind}; {AGAIN}. {READ_HERE}")
    raise UnknownContainer(f"these bytes are no container of weights; {READ_HERE}")


def extract(
    source: Path, target: Path, *, limits: Limits | None = None, sha256: str | None = None
) -> Extracted:
    """Bring any container into canonical form at `target`, a new and synced file beside `source`.

    A file that is canonical already is moved, not copied, and `sha256`, its digest from the upload, is
    believed. Any other source stays. On an error there is no target and the source is untouched. Raises
    `UnknownContainer`, `BadContainer`, `TooLarge`, or `FileExistsError` for a target that is there already.
    """
    limits = limits or Limits()
    size = source.stat().st_size
    if size > limits.file_bytes:
        raise TooLarge(f"{size:,} bytes; {limits.file_bytes:,} are allowed")
    name = sniff(source)
    container = CONTAINERS[name]()
    kept = container.canonical(source, limits)
    if kept is not None:
        digest = sha256 or _digest(source)
        _move(source, target)
        return Extracted(name, kept, digest, size, rewritten=False)
    metadata = container.metadata(source, limits)
    digest = container.extract(source, target, limits)
    try:
        # Against the limits again: a header may be longer in canonical form.
        manifest = read_manifest(target, limits)
    except BaseException:
        target.unlink()
        raise
    return Extracted(
        name, manifest, digest, manifest.total_bytes, rewritten=True, metadata=metadata
    )


def template_ties(container: str, source: Path, *, limits: Limits | None = None) -> Ties | None:
    """None if `write_back` needs no template; else `source` is one: its groups of tied names.

    Raises `BadContainer` if `source` can't be given other weights, since its tensors overlap.
    """
    return CONTAINERS[container]().template(source, limits or Limits())


def write_back(container: str, canonical: Path, out: Path, template: Path | None = None) -> None:
    """Write canonical weights to `out` in `container`; the same weights give the same bytes.

    Not synced. `template` is the file that was uploaded, for containers that keep it. `Unusable` with
    the code NOT_REPRESENTABLE if the container cannot hold them.
    """
    if container not in CONTAINERS:
        raise Unusable(f"weights can't be given as {container!r}", code="NOT_REPRESENTABLE")
    try:
        CONTAINERS[container]().write(canonical, out, template)
    except BaseException:
        out.unlink(missing_ok=True)
        raise


def _move(source: Path, target: Path) -> None:
    """Sync and rename, but never over a target."""
    fd = os.open(source, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}:
            raise
        source.rename(target)  # a file system without hard links
    else:
        source.unlink()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
