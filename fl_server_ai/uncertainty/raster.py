"""The reliability diagram as a PNG, from plain numbers: a few lines, boxes and letters, drawn with numpy."""

import struct
import zlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from fl_server_ai.uncertainty.calibration import Calibration

SCALE = 2  # pixels for each of the SVG's units
WIDTH, HEIGHT, LEFT, TOP, SIDE, DOWN = 420, 380, 56, 44, 340, 280
BLUE, ORANGE, GREY, FAINT, INK = (
    (0, 114, 178),
    (213, 94, 0),
    (85, 85, 85),
    (221, 221, 221),
    (34,) * 3,
)
# Five bits a row, seven rows, as two hexadecimal digits each.
_GLYPHS = """0 0e11131519110e 1 040c040404040e 2 0e11010204081f 3 1f02040201110e 4 02060a121f0202
    5 1f101e0101110e 6 0608101e11110e 7 1f010204080808 8 0e11110e11110e 9 0e11110f01020c
    A 0e11111f111111 B 1e11111e11111e C 0e11101010110e D 1c12111111121c E 1f10101e10101f
    F 1f10101e101010 I 0e04040404040e L 1010101010101f N 11111915131111 O 0e11111111110e
    R 1e11111e141211 T 1f040404040404 U 1111111111110e Y 1111110a040404 . 00000000000c0c - 0000001f000000"""
GLYPHS = dict(zip(_GLYPHS.split()[::2], _GLYPHS.split()[1::2], strict=True))
Colour = tuple[int, ...]


class Canvas:
    """An RGB picture; places are in the SVG's units."""

    def __init__(self, width: int, height: int) -> None:
        self.pixels = np.full((height * SCALE, width * SCALE, 3), 255, np.uint8)

    def box(
        self, x: float, y: float, width: float, height: float, colour: Colour, share: float = 1.0
    ) -> None:
        """Fill it; `share` is how much of the colour covers what is there."""
        left, top = max(round(x * SCALE), 0), max(round(y * SCALE), 0)
        right = max(round((x + width) * SCALE), left + 1)
        part = self.pixels[top : max(round((y + height) * SCALE), top + 1), left:right]
        part[...] = (part * (1 - share) + np.array(colour) * share).astype(np.uint8)

    def dashes(self, x1: float, y1: float, x2: float, y2: float, colour: Colour) -> None:
        """A dashed line, dot by dot."""
        count = int(max(abs(x2 - x1), abs(y2 - y1)) * SCALE) + 1
        for step in range(count + 1):
            if step % 16 < 8:
                at = step / count
                self.box(x1 + (x2 - x1) * at, y1 + (y2 - y1) * at, 1, 1, colour)

    def text(
        self, x: float, y: float, text: str, *, anchor: float = 0.0, turned: bool = False
    ) -> None:
        """In capitals, what has no letter as a gap; `anchor` is the share of its length that lies before x (turned: below y)."""
        bits = np.zeros((7, 6 * len(text)), bool)
        for place, char in enumerate(text.upper()):
            rows = bytes.fromhex(GLYPHS.get(char, "00" * 7))
            for row, value in enumerate(rows):
                for column in range(5):
                    bits[row, 6 * place + column] = bool(value >> (4 - column) & 1)
        drawn = np.kron(np.rot90(bits) if turned else bits, np.ones((SCALE, SCALE), bool))
        across, down = (0.0, 1 - anchor) if turned else (anchor, 0.0)
        top = round(y * SCALE - down * drawn.shape[0])
        left = round(x * SCALE - across * drawn.shape[1])
        self.pixels[top : top + drawn.shape[0], left : left + drawn.shape[1]][drawn] = INK

    def png(self) -> bytes:
        """The file: eight bits a colour, no filter."""
        height, width, _ = self.pixels.shape
        rows = np.zeros((height, 1 + 3 * width), np.uint8)
        rows[:, 1:] = self.pixels.reshape(height, -1)
        head = struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)
        parts = [(b"IHDR", head), (b"IDAT", zlib.compress(rows.tobytes(), 9)), (b"IEND", b"")]
        return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in parts)


def reliability_png(report: "Calibration", title: str = "Reliability") -> bytes:
    """What `reliability_svg` shows, twice as large: accuracy against confidence, and the gaps that the ECE adds up."""
    canvas = Canvas(WIDTH, HEIGHT)
    bottom = TOP + DOWN
    for tick in range(6):
        share = tick / 5
        canvas.box(LEFT + SIDE * share, TOP, 0.5, DOWN, FAINT)
        canvas.box(LEFT, bottom - DOWN * share, SIDE, 0.5, FAINT)
        canvas.text(LEFT + SIDE * share, bottom + 8, f"{share:.1f}", anchor=0.5)
        canvas.text(LEFT - 8, bottom - DOWN * share - 3, f"{share:.1f}", anchor=1.0)
    most = max((part.count for part in report.bins), default=0) or 1
    for part in report.bins:
        if part.accuracy is None or part.confidence is None:
            continue
        width = (part.high - part.low) * SIDE - 1
        tall = DOWN * part.accuracy
        shade = 0.25 + 0.65 * part.count / most
        canvas.box(LEFT + SIDE * part.low, bottom - tall, width, tall, BLUE, shade)
        low, high = sorted((part.accuracy, part.confidence))
        at = LEFT + SIDE * part.confidence
        canvas.box(at - 1, bottom - DOWN * high, 2, DOWN * (high - low), ORANGE)
    canvas.dashes(LEFT, bottom, LEFT + SIDE, TOP, GREY)
    figures = (("ECE", report.ece), ("NLL", report.nll), ("Brier", report.brier))
    said = "  ".join(f"{name} {value:.3f}" for name, value in figures)
    canvas.text(LEFT + SIDE / 2, TOP - 12, said, anchor=0.5)
    canvas.text(LEFT + SIDE / 2, 14, title, anchor=0.5)
    canvas.text(LEFT + SIDE / 2, HEIGHT - 22, "confidence", anchor=0.5)
    canvas.text(12, TOP + DOWN / 2, "accuracy", anchor=0.5, turned=True)
    return canvas.png()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
