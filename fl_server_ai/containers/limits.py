"""How large anything that arrives may claim to be."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bytes and counts; a claim beyond them is refused before anything of that size is allocated."""

    file_bytes: int = 16 * 2**30
    header_bytes: int = 16 * 2**20
    tensors: int = 20_000
    name_length: int = 512
    dimensions: int = 64
    inflation: int = 1_032  # deflate can't do more: a larger ratio is a lie
