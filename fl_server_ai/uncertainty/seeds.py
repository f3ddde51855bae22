"""Random streams by name: draw 7 is the same whether or not draws 0 to 6 were made before."""

import hashlib


def stream_key(seed: int, draw: int, name: str, bits: int = 128) -> int:
    """A number below 2**bits (at most 512); other arguments give an unrelated one, on any machine."""
    text = f"{seed}/{draw}/{name}".encode()  # numbers hold no slash, so no two texts are alike
    return int.from_bytes(hashlib.blake2b(text, digest_size=bits // 8).digest(), "big")
