"""What a training takes from its clients."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from fl_server_ai.aggregation import Extra, Strategy


@dataclass(frozen=True)
class Patterns:
    """Which tensors a training is about, by globs (`*`, `?`, `[abc]`) over whole names."""

    include: Sequence[str] = ()
    exclude: Sequence[str] = ()

    def __contains__(self, name: object) -> bool:
        """Included by any pattern (or there is none), and excluded by none."""
        said = str(name)
        if self.include and not any(fnmatchcase(said, pattern) for pattern in self.include):
            return False
        return not any(fnmatchcase(said, pattern) for pattern in self.exclude)

    def __bool__(self) -> bool:
        return bool(self.include or self.exclude)


@dataclass(frozen=True)
class Wanted:
    """The strategy with its options, and the tensors that are trained."""

    strategy: Strategy[Any]
    patterns: Patterns = Patterns()

    @property
    def extras(self) -> tuple[Extra, ...]:
        return self.strategy.extras()
