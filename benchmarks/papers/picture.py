"""Accuracy round by round, one panel for each check, as SVG."""

from collections.abc import Mapping
from pathlib import Path

from benchmarks.papers.report import Outcome

TITLES = {
    "P1": "P1: Fed-Heart-Disease, pooled test",
    "P2": "P2: MNIST 2NN, 10 of 100 clients",
    "P3": "P3: 8 of 40 workers hostile",
}


def draw(path: Path, outcomes: Mapping[str, Outcome]) -> None:
    """The same curves give the same bytes."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    with mpl.rc_context({"svg.hashsalt": "papers", "font.size": 9}):
        figure, found = plt.subplots(
            1, len(outcomes), figsize=(4.4 * len(outcomes), 3.8), squeeze=False
        )
        for axes, (name, outcome) in zip(found[0], outcomes.items(), strict=True):
            for label, curve in outcome.curves.items():
                dashed = "uniform" in label or "nobody" in label
                rounds = range(1, len(curve) + 1)
                axes.plot(rounds, curve, "--" if dashed else "-", linewidth=1.2, label=label)
            if name == "P2":
                axes.axhline(97, color="grey", linewidth=0.8)
                axes.set_ylim(80, 98.5)
            axes.set(xlabel="round", ylabel="test accuracy, %", title=TITLES[name])
            axes.grid(alpha=0.3)
            axes.legend(fontsize=6.5, loc="lower right" if name != "P3" else "center right")
        figure.tight_layout()
        figure.savefig(path, format="svg", metadata={"Date": None})
        plt.close(figure)
