"""What must hold for any bytes: a refusal with a code, or weights that can be read and written again.

The first byte chooses which part of a file the others are, so that the fuzzer gets past checksums: a whole file, the
pickle program of an archive, the code of a TorchScript archive, or the header of a safetensors file.
"""

import io
import struct
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from fl_server_ai.containers import (
    Limits,
    check_finite,
    extract,
    read_manifest,
    template_ties,
    write_back,
)
from fl_server_core.exceptions import DomainError

STORAGES = {"0": bytes(range(64)), "1": bytes(24), "2": b""}
CONSTANTS = b"\x80\x02)."
CODE = (
    b"class Net(Module):\n"
    b'  __parameters__ = ["w", ]\n'
    b'  __buffers__ = ["b", ]\n'
    b"  w : Tensor\n"
    b"  def forward(self: __torch__.Net, x: Tensor) -> Tensor:\n    return torch.add(x, 1)\n"
)
SCRIPT = (
    b"\x80\x02c__torch__\nNet\n)\x81}(X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n"
    b"((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x10tQ"
    b"K\x00K\x04K\x04\x86K\x04K\x01\x86\x89ccollections\nOrderedDict\n)RtRX\x01\x00\x00\x00bNub."
)


def archive(program: bytes, code: bytes | None = None) -> bytes:
    """A torch archive around a pickle program, with checksums that are right."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as zip:
        zip.writestr("a/data.pkl", program)
        for key, numbers in STORAGES.items():
            zip.writestr(f"a/data/{key}", numbers)
        if code is not None:
            zip.writestr("a/constants.pkl", CONSTANTS)
            zip.writestr("a/code/__torch__.py", code)
    return buffer.getvalue()


KINDS: list[Callable[[bytes], bytes]] = [
    lambda data: data,
    archive,
    lambda data: archive(data, CODE),
    lambda data: archive(SCRIPT, data),
    lambda data: struct.pack("<Q", len(data)) + data + bytes(64),
]
LIMITS = Limits(file_bytes=2**26, npz_free=2**24)


def check(data: bytes) -> bool:
    """Whether the bytes were weights; an error that is no `DomainError` goes through."""
    if not data:
        return False
    with tempfile.TemporaryDirectory(prefix="fl-fuzz-") as name:
        folder = Path(name)
        source, target = folder / "source", folder / "target"
        whole = KINDS[data[0] % len(KINDS)](data[1:])
        source.write_bytes(whole)
        try:
            found = extract(source, target, limits=LIMITS)
        except DomainError as refusal:
            if target.exists():
                raise AssertionError("a refused file left weights behind") from refusal
            return False
        assert read_manifest(target).layout() == found.manifest.layout()
        with suppress(DomainError):  # NaN and infinity are weights too, here
            check_finite(target, found.manifest)
        source.write_bytes(whole)  # a canonical file was moved
        _again(found.container, found.digest, source, target, folder)
        return True


def _again(container: str, digest: str, source: Path, target: Path, folder: Path) -> None:
    """The same weights, written in the file's own container, are read as the same weights."""
    back, again = folder / "back", folder / "again"
    try:
        template_ties(container, source, limits=LIMITS)
        write_back(container, target, back, source)
    except DomainError as refusal:
        if refusal.error_code not in {"OVERLAPPING_TENSORS", "NOT_REPRESENTABLE"}:
            raise AssertionError(refusal.error_code) from refusal
        return
    assert extract(back, again, limits=LIMITS).digest == digest
