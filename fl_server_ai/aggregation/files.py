"""The open files of one aggregation: the base and the updates, of one layout."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from fl_server_ai.aggregation.blocks import (
    OPEN_FILES,
    Source,
    UpdateChanged,
    UpdateFile,
    assert_same_header,
    layout_of,
)
from fl_server_ai.aggregation.crew import run_all


class Files:
    """Opened on construction, closed by `stack`; `sources` are in the order of the updates given."""

    def __init__(self, stack: ExitStack, base: Path | None, updates: Sequence[UpdateFile]) -> None:
        self.updates = updates
        self.sources: list[Source] = []
        for update in updates:
            keep_open = len(updates) <= OPEN_FILES
            source = Source(update.path, update.meta.participant, keep_open=keep_open)
            stack.callback(source.close)
            self.sources.append(source)
        self.base = None if base is None else Source(base, "(base)")
        if self.base is not None:
            stack.callback(self.base.close)
        self._all = [*self.sources, *([self.base] if self.base else [])]
        self.layout = layout_of(self.base or self.sources[0])
        assert_same_header(self._all, self.layout)

    def verify(self, threads: int) -> None:
        """Read every update once and compare it with the digest it was accepted with."""

        def check(index: int) -> None:
            expected = self.updates[index].sha256
            if expected is not None and self.sources[index].digest() != expected:
                raise UpdateChanged(
                    self.sources[index].participant, "is not the one that was accepted"
                )

        def worker() -> Callable[[int], None]:
            return check

        run_all(list(range(len(self.sources))), threads, worker, None)

    def assert_unchanged(self) -> None:
        for source in self._all:
            source.assert_unchanged()
