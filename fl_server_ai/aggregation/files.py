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
from fl_server_ai.aggregation.rebasing import RebasedSource


class Files:
    """Opened on construction, closed by `stack`; `sources` are in the order of the updates given."""

    def __init__(
        self,
        stack: ExitStack,
        base: Path | None,
        updates: Sequence[UpdateFile],
        *,
        rebase: bool = True,
    ) -> None:
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
        starts = self._rebase(stack) if rebase else []
        self._all = [*self.sources, *starts, *([self.base] if self.base else [])]
        self.layout = layout_of(self.base or self.sources[0])
        assert_same_header(self._all, self.layout)
        for source in self.sources:
            if isinstance(source, RebasedSource):
                source.learn(self.layout)

    def _rebase(self, stack: ExitStack) -> list[Source]:
        """Let stale updates be read relative to the base; returns the models they started from."""
        starts: dict[Path, Source] = {}
        for index, update in enumerate(self.updates):
            if update.start is None or self.base is None:
                continue
            if update.start not in starts:
                starts[update.start] = Source(update.start, "(an older version)")
                stack.callback(starts[update.start].close)
            self.sources[index] = RebasedSource(
                self.sources[index], starts[update.start], self.base
            )
        return list(starts.values())

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
