"""What a container module implements; registering it makes `sniff` and `extract` find it."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from fl_server_ai.containers.canonical import Manifest
from fl_server_ai.containers.limits import Limits
from fl_server_core.registry import Registry

# Groups of names for one and the same numbers.
Ties = tuple[tuple[str, ...], ...]


class Container(ABC):
    """One file format for weights. Instances hold nothing; all methods work on files."""

    name: ClassVar[str]

    @abstractmethod
    def matches(self, head: bytes, path: Path) -> bool:
        """Whether this is such a file, damaged or not. `head` is its first 256 bytes.

        At most one container may say yes. Must not raise for any bytes.
        """

    def canonical(self, source: Path, limits: Limits) -> Manifest | None:
        """The file's manifest if it may be kept as it is. Raises `BadContainer`."""
        return None

    @abstractmethod
    def extract(self, source: Path, target: Path, limits: Limits) -> str:
        """Write the canonical form to `target`, which must not exist; its SHA-256 (hexadecimal).

        Best done by `write_canonical`, which syncs it, and removes it on any error.
        """

    def metadata(self, source: Path, limits: Limits) -> Mapping[str, str]:
        """What the file says of itself beside its tensors; nothing in most formats."""
        return {}

    def template(self, source: Path, limits: Limits) -> Ties | None:
        """None if weights can be written without the file that was uploaded; else that file's ties.

        Raises `BadContainer` for a file that is readable, but can't be given other weights.
        """
        return None

    @abstractmethod
    def write(self, canonical: Path, out: Path, template: Path | None = None) -> None:
        """The opposite way; the same weights give the same bytes. May leave a part of `out` on error.

        `template` is the uploaded file, where `template()` asked for it to be kept.
        """


CONTAINERS: Registry[Container] = Registry("fl_server_ai.containers")
