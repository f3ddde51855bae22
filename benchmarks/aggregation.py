"""How fast updates are combined: ours from files, flwr and nvflare from memory, and plain torch additions.

    python benchmarks/aggregation.py [--n 10 100] [--p 1000000 10000000 25000000] [--rules FedAvg Krum]
                                     [--seconds 20] [--quick] [--no-peers] [--docs] [--folder FOLDER]

All of it in one run, on the same numbers. Each pair of runs is one of ours and one of each peer, in turn; figures
are medians over 2 to 7 pairs, as many as `--seconds` allow. Ours reads warm files with two threads; a peer has all
models in memory, and its decoding of what arrived is timed apart. `extra` memory is the peak above what the process
held before: in a fresh process for ours, above its inputs for a peer. The peers get a virtual environment of
their own, `.bench-venv` (300 MB, once). What does not fit into memory is left out, with the reason.
The largest inputs take up to 10 GB of disk under `--folder` (the system's temporary folder), and are removed.
Everything measured is written to `benchmarks/results/aggregation.json`; `--docs` renews the table in
docs/explanation/performance.md.
"""

import argparse
import itertools
import json
import os
import re
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TimeElapsedColumn

from benchmarks.combining import report
from benchmarks.combining.inputs import available, make_inputs
from benchmarks.combining.serve import ROOT, Side
from benchmarks.peers.environment import NotInstallable, peers_python

RULES = ("FedAvg", "FedMedian", "TrimmedMean", "Krum")
OURS, PEERS = "benchmarks/combining/ours.py", "benchmarks/peers/combine.py"
# Times the inputs that a peer needs to have room for, the inputs included.
ROOM = {"FedAvg": 2.1, "FedMedian": 3.1, "TrimmedMean": 3.1, "Krum": 2.2}
SPARE = 2e9
PAIRS = (2, 7)


class Bench:
    """One run over all sizes; `cases` grows as they are measured."""

    def __init__(self, given: argparse.Namespace, console: Console) -> None:
        self.given = given
        self.console = console
        self.cases: list[report.Case] = []
        self.about = report.machine() | {"versions": {}}
        self.reason = ""
        self.python: Path | None = None
        if not given.no_peers:
            self.say(
                "Preparing the peers (flwr and nvflare; installed once into .bench-venv: minutes) ..."
            )
        try:
            self.python = peers_python(install=not given.no_peers)
        except NotInstallable as error:
            self.reason = str(error)
            console.print(f"No peers: {error}")

    def run(self) -> None:
        columns = (SpinnerColumn(), *Progress.get_default_columns()[:2], TimeElapsedColumn())
        with Progress(*columns, console=self.console, transient=True) as progress:
            total = len(self.given.p) * len(self.given.n) * len(self.given.rules)
            self.bar = progress.add_task("", total=total)
            self.progress = progress
            for p in self.given.p:
                with tempfile.TemporaryDirectory(prefix="fl-bench-", dir=self.given.folder) as name:
                    self.size(Path(name), p)

    def say(self, what: str) -> None:
        """A line that is seen at once, also in a file."""
        self.console.print(what, highlight=False, soft_wrap=True)
        self.console.file.flush()

    def tell(self, what: str, done: int = 0) -> None:
        self.progress.update(self.bar, description=what, advance=done)
        if what and not self.console.is_terminal:  # where no bar is shown
            self.say(f"{what} ...")

    def size(self, folder: Path, p: int) -> None:
        """All cases of P parameters: the files are made once, for the largest N that fits."""
        fits = [n for n in self.given.n if 1.3 * 4 * n * p + SPARE < available()]
        for n in sorted(set(self.given.n) - set(fits)):
            self.console.print(
                f"{n} x {p / 1e6:g}M is left out: the files would not stay in memory"
            )
            self.tell("", len(self.given.rules))
        if not fits:
            return
        self.tell(f"writing {max(fits)} x {p / 1e6:g}M")
        written = itertools.count(1)
        every = max(1, max(fits) // 5)

        def wrote() -> None:
            if (number := next(written)) % every == 0:
                self.tell(f"writing {max(fits)} x {p / 1e6:g}M: {number} are there")

        make_inputs(folder, max(fits), p, wrote)
        self.tell("waiting until they are on the disk")
        os.sync()  # or the write-back of the inputs is measured
        for n in fits:
            self.tell(f"starting both sides for {n} x {p / 1e6:g}M")
            with ExitStack() as stack:
                ours = stack.enter_context(Side(sys.executable, OURS))
                peers = stack.enter_context(Side(self.python, PEERS)) if self.python else None
                self.count(folder, n, p, ours, peers)

    def count(self, folder: Path, n: int, p: int, ours: Side, peers: Side | None) -> None:
        inputs = 4.0 * n * p
        decode, offered, reason = {}, [], self.reason
        if peers is not None:
            about = peers.ask("about")
            self.about["versions"] = about["versions"]
            if ROOM["FedAvg"] * inputs + SPARE < available():
                peers.ask("load", folder=str(folder), n=n)
                decode, offered = peers.ask("decode"), about["rules"]
            else:
                reason = "does not fit"
        for rule in self.given.rules:
            self.tell(f"{rule} {n} x {p / 1e6:g}M", 1)
            names = [peer for peer, known in offered if known == rule]
            if (ROOM[rule] - 1) * inputs + SPARE > available():
                names, reason = [], reason or "does not fit"
            case = {"rule": rule, "n": n, "p": p, "decode": decode, "reason": reason}
            self.cases.append(case | self.pairs(folder, n, p, rule, ours, peers, names))
            self.save()

    def save(self) -> str:
        """Everything so far, also as a table; a run that is ended early leaves what it has."""
        results = ROOT / "benchmarks" / "results"
        results.mkdir(exist_ok=True)
        measured = json.dumps({"machine": self.about, "cases": self.cases}, indent=1)
        (results / "aggregation.json").write_text(measured)
        table = report.markdown(self.cases, self.about)
        (results / "aggregation.md").write_text(table)
        return table

    def pairs(
        self,
        folder: Path,
        n: int,
        p: int,
        rule: str,
        ours: Side,
        peers: Side | None,
        names: list[str],
    ) -> dict[str, Any]:
        with Side(sys.executable, OURS) as fresh:
            extra = fresh.ask("combine", folder=str(folder), n=n, rule=rule)["extra"]
        ours.ask("combine", folder=str(folder), n=n, rule=rule)
        found: dict[str, list[Any]] = {"ours": [], "axpy": []}
        theirs: dict[str, list[Any]] = {name: [] for name in names}
        end = time.monotonic() + self.given.seconds
        while len(found["ours"]) < PAIRS[0] or (
            len(found["ours"]) < PAIRS[1] and time.monotonic() < end
        ):
            found["ours"].append(ours.ask("combine", folder=str(folder), n=n, rule=rule))
            for name in names:
                out = None if theirs[name] or peers is None else str(folder / "out")
                if peers is not None:
                    theirs[name].append(peers.ask("combine", peer=name, rule=rule, out=out))
            found["axpy"].append(ours.ask("axpy", n=n, p=p, threads=2))
        return {**found, "peers": theirs, "extra": extra}


def renew(page: Path, table: str) -> None:
    """Put the table between the two marks of the page."""
    text = page.read_text()
    marks = r"(<!-- bench:aggregation -->\n).*(<!-- end -->)"
    page.write_text(re.sub(marks, lambda m: f"{m[1]}\n{table}\n{m[2]}", text, flags=re.DOTALL))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, nargs="+")
    parser.add_argument("--p", type=int, nargs="+")
    parser.add_argument("--rules", nargs="+", default=RULES, choices=RULES)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--quick", action="store_true", help="a million parameters, two minutes")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--docs", action="store_true")
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    given.n = given.n or [10, 100]
    given.p = given.p or ([1_000_000] if given.quick else [1_000_000, 10_000_000, 25_000_000])
    given.seconds = given.seconds or (5 if given.quick else 20)
    console = Console(width=200 if not sys.stdout.isatty() else None)
    bench = Bench(given, console)
    bench.run()
    console.print(report.terminal(bench.cases, bench.about), report.others(bench.cases))
    if given.docs:
        renew(ROOT / "docs" / "explanation" / "performance.md", bench.save())


if __name__ == "__main__":
    main()
