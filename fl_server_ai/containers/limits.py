"""How large anything that arrives may claim to be."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bytes and counts; a claim beyond them is refused before anything of that size is allocated."""

    file_bytes: int = 16 * 2**30  # as it came, and unpacked
    header_bytes: int = 16 * 2**20  # of a safetensors header, and of a zip's directory
    tensors: int = 20_000
    entries: int = 25_000  # of an archive: torch and TorchScript write some beside the tensors
    name_length: int = 512  # characters
    dimensions: int = 64
    npz_ratio: int = 100  # unpacked to packed size, once an archive unpacks to more than npz_free
    npz_free: int = 2**30  # zeros compress a thousandfold, so small archives may have any ratio
    pickle_bytes: int = 8 * 2**20  # of the program in a torch archive
    code_bytes: int = 8 * 2**20  # of a TorchScript archive's own code
    unpacked_code: int = 64 * 2**20  # of the compressed entries of a TorchScript archive
