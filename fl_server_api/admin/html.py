"""Tables and small curves as HTML; every value is escaped."""

from collections.abc import Iterable, Sequence
from datetime import datetime

from django.utils import timezone
from django.utils.formats import localize
from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString

WIDTH, HEIGHT, MARGIN = 220, 44, 4


def cell(value: object) -> object:
    """Moments in the server's time zone without seconds, None as "-"; the rest as it is."""
    if value is None:
        return "-"
    if isinstance(value, datetime):
        return f"{timezone.localtime(value):%Y-%m-%d %H:%M}"
    return value if isinstance(value, SafeString) else localize(value)


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> SafeString:
    """A table; a row has as many cells as there are heads."""
    body = format_html_join(
        "",
        "<tr>{}</tr>",
        ((format_html_join("", "<td>{}</td>", ((cell(value),) for value in row)),) for row in rows),
    )
    head = format_html_join("", '<th scope="col">{}</th>', ((text,) for text in heads))
    return format_html("<table><thead><tr>{}</tr></thead><tbody>{}</tbody></table>", head, body)


def sparkline(points: Sequence[tuple[int, float]], label: str) -> SafeString:
    """Values over steps, ascending, as one SVG line; a single point is a dot. Values are finite."""
    steps = [step for step, _ in points]
    values = [value for _, value in points]
    x0, dx = min(steps), max(max(steps) - min(steps), 1)
    y0, dy = min(values), (max(values) - min(values)) or 1.0
    places = [
        (
            MARGIN + (WIDTH - 2 * MARGIN) * (step - x0) / dx,
            HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * (value - y0) / dy,
        )
        for step, value in points
    ]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    last_x, last_y = places[-1]
    return format_html(
        '<svg role="img" aria-label="{}" width="{}" height="{}" viewBox="0 0 {} {}">'
        '<polyline points="{}" fill="none" stroke="currentColor" stroke-width="1.5"/>'
        '<circle cx="{}" cy="{}" r="2.5" fill="currentColor"/></svg>',
        label,
        WIDTH,
        HEIGHT,
        WIDTH,
        HEIGHT,
        line,
        f"{last_x:.1f}",
        f"{last_y:.1f}",
    )
