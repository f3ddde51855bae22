"""Calibration and ranking as small SVG pictures, from plain numbers: no plotting library, no torch."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from math import floor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fl_server_ai.uncertainty.calibration import Calibration
    from fl_server_ai.uncertainty.ranking import Ranking

WIDTH, HEIGHT = 420, 380
LEFT, TOP, SIDE, DOWN = 56, 44, 340, 280  # the plotting area
LEAST_COVERAGE = 0.02
# Told apart by the colour-blind (Okabe and Ito), and by their dashes in black and white.
STROKES = (
    ("#0072b2", ""),
    ("#d55e00", "7 3"),
    ("#009e73", "2 3"),
    ("#cc79a7", "9 3 2 3"),
    ("#56b4e9", "5 5"),
    ("#e69f00", "1 2"),
    ("#000000", "12 4"),
)


def reliability_svg(report: "Calibration", title: str = "Reliability") -> str:
    """Accuracy against confidence for each bin that has samples; a bar's opacity shows its share."""
    y = _Scale(0.0, 1.0, TOP + DOWN, TOP)
    x = _Scale(0.0, 1.0, LEFT, LEFT + SIDE)
    most = max((part.count for part in report.bins), default=0) or 1
    marks = []
    for part in report.bins:
        if part.accuracy is None or part.confidence is None:
            continue
        left, right, top = x(part.low), x(part.high), y(part.accuracy)
        marks.append(
            f'<rect x="{left:.1f}" y="{top:.1f}" width="{right - left - 1:.1f}" '
            f'height="{y(0) - top:.1f}" fill="{STROKES[0][0]}" '
            f'fill-opacity="{0.25 + 0.65 * part.count / most:.2f}"><title>{part.low:.3f} to '
            f"{part.high:.3f}: {part.count} samples, accuracy {part.accuracy:.3f}, confidence "
            f"{part.confidence:.3f}</title></rect>"
        )
        marks.append(  # the gap that the ECE adds up
            f'<line x1="{x(part.confidence):.1f}" x2="{x(part.confidence):.1f}" y1="{top:.1f}" '
            f'y2="{y(part.confidence):.1f}" stroke="{STROKES[1][0]}" stroke-width="2"/>'
        )
    marks.append(
        f'<line x1="{x(0)}" y1="{y(0)}" x2="{x(1)}" y2="{y(1)}" stroke="#555" '
        'stroke-dasharray="4 4"/>'
    )
    marks.append(
        _text(
            LEFT + SIDE / 2,
            TOP - 4,
            f"ECE {report.ece:.3f}   NLL {report.nll:.3f}   Brier {report.brier:.3f}",
            anchor="middle",
        )
    )
    across = "confidence (darker: more samples; orange: gap to accuracy)"
    return _picture(title, across, "accuracy", x, y, marks)


def coverage_svg(
    rankings: Mapping[str, "Ranking"], title: str = "Accuracy against coverage"
) -> str:
    """One line a method, on common axes, with its AUROC of error detection in the legend.

    Lines begin at a coverage of 2 %: the accuracy of a handful of samples says little, and hides the rest.
    """
    lines = {name: _shown(ranking) for name, ranking in rankings.items()}
    lowest = min((accuracy for line in lines.values() for _, accuracy in line), default=0.0)
    y = _Scale(min(floor(lowest * 20) / 20, 0.95), 1.0, TOP + DOWN, TOP + 4)
    x = _Scale(0.0, 1.0, LEFT, LEFT + SIDE)
    marks = []
    for row, (name, ranking) in enumerate(rankings.items()):
        colour, dashes = STROKES[row % len(STROKES)]
        points = [(x(coverage), y(accuracy)) for coverage, accuracy in lines[name]]
        path = " ".join(f"{left:.1f},{top:.1f}" for left, top in _thinned(points))
        style = f'fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dashes}"'
        marks.append(f'<polyline points="{path}" {style}/>')
        if len(points) == 1:  # no order among the samples: a point, which a line would not show
            marks.append(
                f'<circle cx="{points[0][0]:.1f}" cy="{points[0][1]:.1f}" r="4" fill="{colour}"/>'
            )
        down = HEIGHT + 8 + 18 * row  # below the axes, where no line runs
        auroc = "no AUROC" if ranking.auroc is None else f"AUROC {ranking.auroc:.3f}"
        marks.append(f'<line x1="{LEFT + 8}" x2="{LEFT + 40}" y1="{down}" y2="{down}" {style}/>')
        marks.append(_text(LEFT + 46, down + 4, f"{name}   {auroc}", anchor="start"))
    height = HEIGHT + 18 * len(rankings)
    return _picture(title, "share of samples kept", "accuracy on them", x, y, marks, height)


def _shown(ranking: "Ranking") -> list[tuple[float, float]]:
    points = zip(ranking.coverage, ranking.accuracy, strict=True)
    return [(coverage, accuracy) for coverage, accuracy in points if coverage >= LEAST_COVERAGE]


class _Scale:
    """Numbers to pixels, with six ticks."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.high, self.start, self.end = low, high, start, end

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        return [self.low + (self.high - self.low) * step / 5 for step in range(6)]


def _thinned(points: Sequence[tuple[float, float]]) -> Iterable[tuple[float, float]]:
    """Points that move by less than half a pixel are left out; the last one stays."""
    kept: list[tuple[float, float]] = []
    for point in points[:-1]:
        if not kept or max(abs(point[0] - kept[-1][0]), abs(point[1] - kept[-1][1])) >= 0.5:
            kept.append(point)
    return [*kept, *points[-1:]]


def _text(x: float, y: float, text: str, *, anchor: str, size: int = 12, more: str = "") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}"'
    return f'<text {place} xml:space="preserve"{more}>{escape(text)}</text>'


def _picture(
    title: str,
    across: str,
    up: str,
    x: _Scale,
    y: _Scale,
    marks: Iterable[str],
    height: int = HEIGHT,
) -> str:
    bottom, middle = TOP + DOWN, TOP + DOWN / 2
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
        f'height="{height}" role="img" font-family="sans-serif" fill="#222">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
        _text(LEFT + SIDE / 2, 26, title, anchor="middle", size=15),
    ]
    for tick in x.ticks():
        lines.append(
            f'<line x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{TOP}" y2="{bottom}" stroke="#ddd"/>'
        )
        lines.append(_text(x(tick), bottom + 18, f"{tick:.1f}", anchor="middle"))
    digits = 1 if y.high - y.low == 1 else 2
    for tick in y.ticks():
        lines.append(
            f'<line x1="{LEFT}" x2="{LEFT + SIDE}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" '
            'stroke="#ddd"/>'
        )
        lines.append(_text(LEFT - 8, y(tick) + 4, f"{tick:.{digits}f}", anchor="end"))
    lines.append(_text(LEFT + SIDE / 2, HEIGHT - 16, across, anchor="middle"))
    turned = f' transform="rotate(-90 16 {middle})"'
    lines.append(_text(16, middle, up, anchor="middle", more=turned))
    return "\n".join([*lines, *marks, "</svg>"]) + "\n"
