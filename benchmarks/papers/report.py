"""What the checks say: rows that compare, curves, a table and a JSON file."""

import datetime as dt
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
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
    cpu_seconds: float = 0.0  # of server and sites together

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


def keep(path: Path, name: str, outcome: Outcome) -> None:
    """Write one check to the JSON file; what the file has of the other checks stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    checks = json.loads(path.read_text()) if path.exists() else {}
    day = dt.datetime.now(dt.UTC).date().isoformat()
    machine = {"torch": torch.__version__, "cores": os.cpu_count()}
    checks[name] = {"date": day, **machine, **asdict(outcome)}
    path.write_text(json.dumps(dict(sorted(checks.items())), indent=1) + "\n")


def kept(path: Path) -> dict[str, Outcome]:
    """All checks of the JSON file, by name."""
    names = {field.name for field in fields(Outcome)}
    found = {}
    for name, row in json.loads(path.read_text()).items():
        found[name] = Outcome(**{key: value for key, value in row.items() if key in names})
        found[name].rows = [Row(**one) for one in row["rows"]]
    return found
