"""Draws the state tables of `lifecycle.py` as SVG: boxes are placed here, arrows come from the table.

A state without a place, or a place without a state, is an error: the pictures can't fall behind.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from typing import Any

COLUMN, ROW, HEIGHT, WIDTH, MARGIN = 166.0, 104.0, 38.0, 104.0, 16.0
BESIDE = 9.0  # between an arrow and the one that leads back


@dataclass(frozen=True)
class Picture:
    """Where each state stands: (row, first column, last column); and what to say of some moves."""

    title: str
    places: Mapping[str, tuple[float, float, float]]
    ends: frozenset[str]
    words: Mapping[tuple[str, str], str] = field(default_factory=dict)
    # For arrows that would run through a box: the column (which may lie between two) to go down in.
    ways: Mapping[tuple[str, str], float] = field(default_factory=dict)


PICTURES = {
    "TrainingState": Picture(
        "States of a training",
        {
            "X": (0, 0, 3), "I": (1, 0, 0), "O": (1, 1, 1), "P": (1, 2, 2), "S": (1, 3, 3),
            "C": (2, 0, 0), "E": (2, 1, 3),
        },
        frozenset("XCE"),
        {
            ("I", "O"): "start", ("O", "P"): "pause", ("P", "O"): "resume", ("E", "O"): "retry",
            ("E", "S"): "retry", ("I", "X"): "cancel",
        },
    ),
    "RoundPhase": Picture(
        "Phases of a round",
        {
            "skipped": (0, 0, 5), "notifying": (1.3, 0, 0), "collecting": (1.3, 1, 1),
            "aggregating": (1.3, 2, 2), "swag": (1.3, 3, 3), "testing": (1.3, 4, 4),
            "done": (1.3, 5, 5), "failed": (2.4, 0, 5),
        },
        frozenset({"done", "failed"}),
        {
            ("failed", "collecting"): "retry", ("collecting", "skipped"): "skip",
            ("aggregating", "collecting"): "lost updates",
        },
        {("skipped", "failed"): 4.5},
    ),
    "TaskState": Picture(
        "States of a part (task)",
        {
            "cancelled": (0, 0, 1), "open": (1, 0, 0), "done": (1, 1, 1), "failed": (2, 0, 0),
            "expired": (2, 1, 1),
        },
        frozenset({"done", "failed", "expired", "cancelled"}),
        {("failed", "open"): "again", ("cancelled", "done"): "release"},
    ),
    "UpdateState": Picture(
        "States of an update",
        {
            "received": (0, 0, 0), "accepted": (0, 1, 1), "consumed": (0, 2, 2),
            "quarantined": (1, 0, 0), "refused": (1, 1, 1),
        },
        frozenset({"consumed", "refused"}),
        {("quarantined", "accepted"): "release"},
    ),
    "EventState": Picture(
        "States of a piece of work (event)",
        {"pending": (0, 0, 0), "running": (0, 1, 1), "done": (0, 2, 2), "failed": (1, 0, 1)},
        frozenset({"done", "failed"}),
        {
            ("pending", "running"): "claim", ("running", "pending"): "try later",
            ("failed", "pending"): "retry",
        },
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Box:
    left: float
    top: float
    right: float
    bottom: float

    @property
    def x(self) -> float:
        return (self.left + self.right) / 2

    @property
    def y(self) -> float:
        return (self.top + self.bottom) / 2


def drawn(kind: Any, moves: Mapping[str, frozenset[str]]) -> str:
    """The picture of one table of moves."""
    picture = PICTURES[kind.__name__]
    if set(picture.places) != set(kind.values):
        raise ValueError(f"docs/states.py and {kind.__name__} have different states")
    boxes = {state: _box(place) for state, place in picture.places.items()}
    arrows = [
        _arrow(picture, boxes, state, to, both=state in moves[to])
        for state, targets in moves.items()
        for to in sorted(targets)
    ]
    shapes = [_shape(boxes[s], _label(kind(s)), end=s in picture.ends) for s in kind.values]
    width = max(box.right for box in boxes.values()) + MARGIN
    height = max(box.bottom for box in boxes.values()) + MARGIN
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
        f'width="{width:g}" height="{height:g}" font-family="system-ui, sans-serif" font-size="13" role="img" '
        f'aria-label="{escape(picture.title)}">\n'
        '<defs><marker id="m" viewBox="0 0 8 8" refX="7.5" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto"><path d="M0 0 8 4 0 8z" fill="#456"/></marker></defs>\n'
        f'<rect width="{width:g}" height="{height:g}" fill="#fff"/>\n'
        + "\n".join([*arrows, *shapes])
        + "\n</svg>\n"
    )


def _label(state: Any) -> str:
    label = str(state.label)
    return label if label.isupper() or " " in label else label.lower().replace("swag", "SWAG")


def _box(place: tuple[float, float, float]) -> Box:
    row, first, last = place
    left = MARGIN + first * COLUMN
    top = MARGIN + row * ROW
    return Box(left, top, MARGIN + last * COLUMN + WIDTH, top + HEIGHT)


def _shape(box: Box, label: str, *, end: bool) -> str:
    fill, edge = ("#f3f3ee", "#887") if end else ("#e7f0fa", "#456")
    return (
        f'<rect x="{box.left:g}" y="{box.top:g}" width="{box.right - box.left:g}" '
        f'height="{HEIGHT:g}" rx="8" fill="{fill}" stroke="{edge}"/>'
        f'<text x="{box.x:g}" y="{box.y + 4.5:g}" text-anchor="middle" font-weight="600" '
        f'fill="#123">{escape(label)}</text>'
    )


def _arrow(picture: Picture, boxes: Mapping[str, Box], state: str, to: str, *, both: bool) -> str:
    begin, end = boxes[state], boxes[to]
    word = picture.words.get((state, to), "")
    aside = BESIDE if both else 0.0
    if begin.top == end.top:
        sign = 1.0 if begin.x < end.x else -1.0
        near = abs(begin.x - end.x) <= COLUMN
        return (_across if near else _arc)(begin, end, sign, aside, word)
    down = end.top > begin.top
    way = picture.ways.get((state, to))
    x = _common(begin, end) if way is None else MARGIN + way * COLUMN + WIDTH / 2
    y1, y2 = (begin.bottom, end.top) if down else (begin.top, end.bottom)
    if x is None:
        x1 = begin.left + 22 if end.x < begin.x else begin.right - 22
        x2 = end.right - 22 if end.x < begin.x else end.left + 22
        x1, x2 = (x1 + aside, x2 + aside) if down else (x1 - aside, x2 - aside)
        middle = (y1 + y2) / 2
        path = f"M{x1:g} {y1:g}C{x1:g} {middle:g} {x2:g} {middle:g} {x2:g} {y2:g}"
        return _path(path) + _word((x1 + x2) / 2, middle, word)
    x += aside if down else -aside
    anchor = x + (8 if down or not both else -8)
    side = "start" if down or not both else "end"
    return _path(f"M{x:g} {y1:g}V{y2:g}") + _word(anchor, (y1 + y2) / 2 + 4, word, side)


def _common(begin: Box, end: Box) -> float | None:
    """The middle of the narrower one, if the other is above or below it."""
    narrow, wide = sorted((begin, end), key=lambda box: box.right - box.left)
    return narrow.x if wide.left <= narrow.x <= wide.right else None


def _across(begin: Box, end: Box, sign: float, aside: float, word: str) -> str:
    y = begin.y - sign * aside
    x1, x2 = (begin.right, end.left) if sign > 0 else (begin.left, end.right)
    return _path(f"M{x1:g} {y:g}H{x2:g}") + _word(
        (x1 + x2) / 2, y - 5 if sign > 0 else y + 14, word, size=11.5
    )


def _arc(begin: Box, end: Box, sign: float, aside: float, word: str) -> str:
    """Over what is in between; the way back runs below."""
    rise = 20.0 + 9.0 * abs(end.x - begin.x) / COLUMN
    x1, x2 = begin.x + sign * 30, end.x - sign * 30
    if sign > 0:
        y, bend = begin.top, begin.top - rise
    else:
        y, bend = begin.bottom, begin.bottom + rise
    path = f"M{x1:g} {y:g}C{x1 + sign * 26:g} {bend:g} {x2 - sign * 26:g} {bend:g} {x2:g} {y:g}"
    return _path(path) + _word((x1 + x2) / 2, bend, word)


def _path(path: str) -> str:
    return f'<path d="{path}" fill="none" stroke="#456" stroke-width="1.3" marker-end="url(#m)"/>'


def _word(x: float, y: float, word: str, anchor: str = "middle", size: float = 12.0) -> str:
    if not word:
        return ""
    return (
        f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="{size:g}" fill="#356" '
        f'stroke="#fff" stroke-width="4" paint-order="stroke">{escape(word)}</text>'
    )
