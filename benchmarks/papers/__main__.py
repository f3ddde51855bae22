"""The command behind `make papers`: start a server, run the checks, compare, and say it with the exit status."""

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.papers import data, heart, robust, two_nn
from benchmarks.papers.federation import Federation
from benchmarks.papers.picture import draw
from benchmarks.papers.report import Outcome, Tell, keep, kept, publish, show

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "papers.json"
PAGE = ROOT / "docs" / "explanation" / "paper-checks.md"
PICTURE = ROOT / "docs" / "images" / "papers.svg"
Check = Callable[[Federation, Tell], Outcome]


def chosen(options: argparse.Namespace) -> dict[str, tuple[str, Check]]:
    """By check the file that it needs, and what runs it."""

    def p2(federation: Federation, tell: Tell) -> Outcome:
        images = data.mnist(options.data)
        seeds = two_nn.SEEDS[: options.seeds]
        return two_nn.check(federation, images, tell, seeds=seeds, non_iid=options.non_iid)

    known: dict[str, tuple[str, Check]] = {
        "P1": (data.HEART, lambda f, tell: heart.check(f, data.heart(options.data), tell)),
        "P2": (data.MNIST, p2),
        "P3": (data.MNIST, lambda f, tell: robust.check(f, data.mnist(options.data), tell)),
    }
    return {name: known[name] for name in options.checks or known}


def run(console: Console, checks: dict[str, tuple[str, Check]], results: Path) -> list[Outcome]:
    """One server for all of them; each is kept as soon as it has ended."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(pulse_style="blue"),
        TextColumn("{task.fields[said]}"),
        TimeElapsedColumn(),
    )
    outcomes = []
    with (
        tempfile.TemporaryDirectory(prefix="papers-") as folder,
        Federation(Path(folder)) as federation,
        Progress(*columns, console=console, disable=not console.is_terminal) as progress,
    ):
        shown = progress.add_task("making accounts", total=None, said="")
        for name, (_, check) in checks.items():
            began, spent = time.monotonic(), federation.cpu()
            last = ""

            def tell(what: str, number: int, accuracy: float) -> None:
                nonlocal last
                progress.update(
                    shown, description=what, said=f"round {number:>3}, accuracy {accuracy:5.2f} %"
                )
                if not console.is_terminal and what != last:
                    console.print(what, highlight=False)
                last = what

            outcome = check(federation, tell)
            outcome.seconds = time.monotonic() - began
            outcome.cpu_seconds = federation.cpu() - spent
            keep(results, name, outcome)
            outcomes.append(outcome)
    return outcomes


def main() -> int:
    """0 if all that could run has passed, 1 if anything missed, 2 if nothing could run."""
    parser = argparse.ArgumentParser(prog="make papers", description=__doc__)
    parser.add_argument("checks", nargs="*", metavar="P1 P2 P3", help="only these")
    parser.add_argument("--data", type=Path, default=data.FOLDER, help="folder of the data sets")
    parser.add_argument("--seeds", type=int, default=3, choices=(1, 2, 3), help="of P2")
    parser.add_argument(
        "--non-iid", action="store_true", help="P2 also by digit: 240 to 400 rounds more"
    )
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument(
        "--docs",
        action="store_true",
        help="write all of the JSON file into the docs: tables, picture",
    )
    options = parser.parse_args()
    if unknown := set(options.checks) - {"P1", "P2", "P3"}:
        parser.error(f"there is no check {', '.join(sorted(unknown))}; there are P1, P2 and P3")
    console = Console(width=None if sys.stdout.isatty() else 120)
    checks = chosen(options)
    for name in list(checks):
        if why := data.missing(options.data, checks[name][0]):
            console.print(f"{name} is left out: {why}", highlight=False, soft_wrap=True)
            del checks[name]
    if not checks:
        console.print(data.WANTED, highlight=False, soft_wrap=True)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the server ends with us
    outcomes = run(console, checks, options.json)
    show(console, outcomes)
    for name, outcome in zip(checks, outcomes, strict=True):
        console.print(
            f"{name} took {outcome.seconds:.0f} s, and {outcome.cpu_seconds:.0f} s of the processor",
            highlight=False,
        )
    if options.docs:
        publish(PAGE, kept(options.json))
        draw(PICTURE, kept(options.json))
    return 0 if all(outcome.passed for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
