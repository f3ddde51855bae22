"""Digests of files, a piece at a time."""

import hashlib
from pathlib import Path


def sha256_of(path: Path) -> str:
    """Hexadecimal, in constant memory."""
    digest = hashlib.sha256()  # hashlib.file_digest would need Python 3.11
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
