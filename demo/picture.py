"""Accuracy by round, as text bars and as a PNG; accuracy by coverage, as table and SVG; and the summary."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fl_server_ai.uncertainty.ranking import Ranking

WIDTH = 40
SHARES = (1.0, 0.8, 0.6, 0.4, 0.2)


def bar(share: float) -> str:
    """A text bar for a share of one."""
    filled = round(share * WIDTH)
    return "█" * filled + "░" * (WIDTH - filled)


def bars(console: Console, accuracies: Sequence[float]) -> None:
    """One bar a round."""
    for number, share in enumerate(accuracies, start=1):
        console.print(f"  round {number:>2}  {bar(share)}  {share:6.1%}", highlight=False)


def save_png(path: Path, accuracies: Sequence[float], best_alone: float) -> None:
    """The curve, with the best site alone as a dashed line."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), dpi=120)
    rounds = range(1, len(accuracies) + 1)
    axes.plot(rounds, [100 * a for a in accuracies], marker="o", label="federated")
    axes.axhline(100 * best_alone, color="grey", linestyle="--", label="best site alone")
    axes.set(xlabel="round", ylabel="test accuracy, %", ylim=(0, 100), xticks=list(rounds))
    axes.set_title("Digits, non-IID, FedAvg")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def summary(console: Console, result: dict[str, Any]) -> None:
    """The tables at the end."""
    table = Table(title="Federated training")
    for column in (
        "rounds",
        "updates a round",
        "accuracy",
        "sent to sites",
        "sent by sites",
        "seconds",
    ):
        table.add_column(column, justify="right")
    table.add_row(
        str(result["rounds"]),
        str(min(result["updates_per_round"])),
        f"{result['accuracy']:.1%}",
        f"{result['bytes_down'] / 1e6:.1f} MB",
        f"{result['bytes_up'] / 1e6:.1f} MB",
        f"{result['seconds']:.1f}",
    )
    console.print(table)
    sites = Table(title="The same network, each site alone, trained as long")
    for column in ("site", "reached by", "images", "mostly digits", "accuracy alone"):
        sites.add_column(column, justify="right")
    for site in result["sites"]:
        digits = ", ".join(map(str, site["dominant"]))
        sites.add_row(
            site["name"],
            site["mode"],
            str(site["samples"]),
            f"{digits} ({site['dominant_share']:.0%})",
            f"{site['alone']:.1%}",
        )
    console.print(sites)


def coverage(console: Console, path: Path, rankings: Mapping[str, Mapping[str, Any]]) -> None:
    """Accuracy when the least certain corrupted digits are set aside."""
    from fl_server_ai.uncertainty.pictures import coverage_svg

    found = {name: Ranking(**ranking) for name, ranking in rankings.items()}
    path.write_text(coverage_svg(found, "Corrupted digits: the least certain set aside"))
    table = Table(title="Corrupted digits: accuracy on the most certain share of them")
    table.add_column("method")
    for share in SHARES:
        table.add_column("all" if share == 1 else f"{share:.0%}", justify="right")
    table.add_column("AUROC of errors", justify="right")
    for name, ranking in found.items():
        cells = [f"{accuracy_at(ranking, share):.1%}" for share in SHARES]
        auroc = "none" if ranking.auroc is None else f"{ranking.auroc:.3f}"
        table.add_row(name, *cells, auroc)
    console.print(table)
    console.print(
        "The ensemble's other members have trained for half as many rounds, which costs it accuracy."
    )


def accuracy_at(ranking: Ranking, share: float) -> float:
    """Accuracy of the most certain digits, at least this share of all."""
    pairs = zip(ranking.coverage, ranking.accuracy, strict=True)
    return next(accuracy for kept, accuracy in pairs if kept >= share - 1e-9)
