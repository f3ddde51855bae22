"""Bodies packed on their way, with what the server says that it reads (`Accept-Encoding` of its answers, RFC 7694)."""

import gzip
import importlib
import importlib.util
import sys
from collections.abc import Callable

WORTH = 0.95  # of the size; numbers of a trained model hardly shrink, sparse or quantised ones do


def packer(offered: str) -> tuple[str, Callable[[bytes], bytes]] | None:
    """The best coding that both know, with its function; None if there is none. Equal bytes pack to equal bytes."""
    codings = {part.partition(";")[0].strip().lower() for part in offered.split(",")}
    if "zstd" in codings and (module := _zstd()):
        return "zstd", importlib.import_module(module).compress
    if "gzip" in codings:
        return "gzip", _gzip
    return None


def _gzip(data: bytes) -> bytes:
    return gzip.compress(data, compresslevel=1, mtime=0)


def _zstd() -> str:
    if sys.version_info >= (3, 14):
        return "compression.zstd"
    known = importlib.util.find_spec("backports") and importlib.util.find_spec("backports.zstd")
    return "backports.zstd" if known else ""
