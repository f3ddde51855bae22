"""What the measurements come to: rows for the terminal, and a Markdown table for the documentation."""

import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from benchmarks.combining.inputs import available
from benchmarks.combining.serve import median

Case = dict[str, Any]
GOALS = {
    ("FedMedian", 10): 8, ("TrimmedMean", 10): 8, ("Krum", 10): 12,
    ("FedMedian", 100): 4, ("TrimmedMean", 100): 4, ("Krum", 100): 6,
}  # fmt: skip
MEAN = {"RAM": 1.3, "decode": 4.0}
MB, ALLOWED = 1e6, 150e6
COLUMNS = (
    "rule", "updates", "ours: s", "CPU s", "input GB/s", "of axpy", "fastest peer", "s", "CPU s",
    "decode s", "times faster", "with decode", "by CPU", "goal", "extra MB: ours", "goal", "peer",
)  # fmt: skip


def machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "cpu": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "available": available(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "vectors": torch.backends.cpu.get_cpu_capability(),
    }


def described(about: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    return (
        f"{about['date'][:10]}, {about['cores']} cores of {about['cpu']} ({about['vectors']}), "
        f"{about['memory'] / 1e9:.0f} GB, load {about['load']:.1f} when it began; Python "
        f"{about['python']}, torch {about['torch']}{', ' + versions if versions else ''}"
    )


def figures(case: Case) -> list[str]:
    """One row, in the order of COLUMNS; the fastest peer is the one with the shortest wall time."""
    ours, n, p = case["ours"], case["n"], case["p"]
    wall, cpu = median(ours, "wall"), median(ours, "cpu")
    speed = 4 * n * p / wall / 1e9
    row = [
        case["rule"],
        f"{n} x {p / 1e6:g}M",
        f"{wall:.3f}",
        f"{cpu:.3f}",
        f"{speed:.1f}",
        f"{speed / (4 * n * p / median(case['axpy'], 'wall') / 1e9):.2f}",
    ]
    goal = f"{(1.5 * 4 * p + ALLOWED) / MB:.0f}"
    memory = [f"{case['extra'] / MB:.0f}", goal]
    if not case["peers"]:
        return [*row, case["reason"], *[""] * 7, *memory, ""]
    peer = min(case["peers"], key=lambda name: median(case["peers"][name], "wall"))
    runs = case["peers"][peer]
    theirs = median(runs, "wall")
    decode = n * case["decode"][peer]
    return [
        *row,
        peer,
        f"{theirs:.3f}",
        f"{median(runs, 'cpu'):.3f}",
        f"{decode:.2f}",
        f"{ratio(runs, ours, 'wall'):.1f}",
        f"{(theirs + decode) / wall:.1f}",
        f"{ratio(runs, ours, 'cpu'):.1f}",
        wanted(case["rule"], n),
        *memory,
        f"{max(run['extra'] for run in runs) / MB:.0f}",
    ]


def ratio(theirs: Sequence[Case], ours: Sequence[Case], key: str) -> float:
    """The median over the pairs, which were run one after the other."""
    pairs = [{"r": their[key] / our[key]} for their, our in zip(theirs, ours, strict=False)]
    return median(pairs, "r")


def wanted(rule: str, n: int) -> str:
    if rule == "FedAvg":
        return f"{MEAN['RAM']} and {MEAN['decode']:g}" if n == 100 else ""
    return f"{GOALS[rule, n]}" if (rule, n) in GOALS else ""


def terminal(cases: Sequence[Case], about: dict[str, Any]) -> Table:
    table = Table(title="Ours from files, peers from memory", caption=described(about))
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for case in cases:
        table.add_row(*figures(case))
    return table


def others(cases: Sequence[Case]) -> Table:
    """All peers, and the plain additions: seconds."""
    table = Table(title="Each side's seconds: wall (CPU)")
    names = sorted({name for case in cases for name in case["peers"]})
    for column in ("rule", "updates", "ours", "of it the end", *names, "axpy", "off by at most"):
        table.add_column(column, justify="right")
    for case in cases:
        off = [run["off"] for runs in case["peers"].values() for run in runs if "off" in run]
        table.add_row(
            case["rule"],
            f"{case['n']} x {case['p'] / 1e6:g}M",
            pair(case["ours"]),
            f"{median(case['ours'], 'end'):.3f}",
            *(pair(case["peers"].get(name, [])) for name in names),
            pair(case["axpy"]),
            f"{max(off):.1e}" if off else "",
        )
    return table


def pair(runs: Sequence[Case]) -> str:
    return f"{median(runs, 'wall'):.3f} ({median(runs, 'cpu'):.3f})" if runs else ""


def markdown(cases: Sequence[Case], about: dict[str, Any]) -> str:
    lines = [
        f"Measured {described(about)}:",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "| " + " | ".join("---" for _ in COLUMNS) + " |",
        *("| " + " | ".join(figures(case)) + " |" for case in cases),
    ]
    return "\n".join(lines) + "\n"
