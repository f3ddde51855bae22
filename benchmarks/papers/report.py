"""What the checks say: rows that compare, curves, a table and a JSON file."""

import datetime as dt
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

BEGIN, END = "<!-- tables: make papers PAPERS=--docs -->", "<!-- end of tables -->"
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
    cpu_seconds: float | None = None  # of server and sites together
    date: str = ""
    torch: str = str(torch.__version__)
    cores: int | None = os.cpu_count()

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
    """Write one check to the JSON file, with today's date; what the file has of the other checks stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    checks = json.loads(path.read_text()) if path.exists() else {}
    outcome.date = dt.datetime.now(dt.UTC).date().isoformat()
    checks[name] = asdict(outcome)
    path.write_text(json.dumps(dict(sorted(checks.items())), indent=1) + "\n")


def kept(path: Path) -> dict[str, Outcome]:
    """All checks of the JSON file, by name."""
    found = {name: Outcome(**row) for name, row in json.loads(path.read_text()).items()}
    for outcome in found.values():
        outcome.rows = [Row(**row) for row in outcome.rows]  # type: ignore[arg-type]
    return found


def tables(outcomes: Mapping[str, Outcome]) -> str:
    """Markdown: a table of all rows, and one of what they took."""
    lines = ["| check | what | expected | reached | |", "| --- | --- | --- | --- | --- |"]
    for row in (row for outcome in outcomes.values() for row in outcome.rows):
        verdict = "passed" if row.passed else "**missed**"
        lines.append(f"| {row.check} | {row.what} | {row.expected} | {row.reached} | {verdict} |")
    lines += [
        "",
        "| check | run on | torch | seconds | seconds of the processor, server and sites | cores |",
    ]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for name, one in outcomes.items():
        spent = "not measured" if one.cpu_seconds is None else f"{one.cpu_seconds:.0f}"
        took = f"{one.seconds:.0f} | {spent}"
        lines.append(f"| {name} | {one.date} | {one.torch} | {took} | {one.cores} |")
    return "\n".join(lines) + "\n"


def publish(page: Path, outcomes: Mapping[str, Outcome]) -> None:
    """Put the tables between the two markers of the page."""
    before, _, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"{page} has no {BEGIN} and {END} to put the tables between")
    page.write_text(f"{before}{BEGIN}\n\n{tables(outcomes)}\n{END}{after}")
