"""What the checks say: rows that compare, curves, a table and a JSON file."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Tell = Callable[[str, int, float], None]  # what is trained, the round that has ended, accuracy in %


@dataclass(frozen=True)
class Row:
    """One comparison."""

    check: str
    what: str
    expected: str
    reached: str
    passed: bool


@dataclass
class Outcome:
    """What one check has come to; `curves` are accuracies in percent, round by round."""

    rows: list[Row] = field(default_factory=list)
    curves: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return all(row.passed for row in self.rows)


def show(console: Console, outcomes: Sequence[Outcome]) -> None:
    """All rows as one table."""
    table = Table(title="Published results, through a running server")
    for column in ("check", "what", "expected", "reached", ""):
        table.add_column(column, overflow="fold")
    for row in (row for outcome in outcomes for row in outcome.rows):
        verdict = "[green]passed[/]" if row.passed else "[bold red]missed[/]"
        table.add_row(row.check, row.what, row.expected, row.reached, verdict)
    console.print(table)


def save(path: Path, outcomes: dict[str, Outcome], **about: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    checks = {name: asdict(outcome) for name, outcome in outcomes.items()}
    path.write_text(json.dumps({**about, "checks": checks}, indent=1) + "\n")
