"""What the child does with an input before the program sees it; said without torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# What the child says must not look like a path: those are taken out of it.
DECLARE = "upload a pipeline as its model_preprocessing_file"


@dataclass(frozen=True)
class Preparation:
    """`image`: the input is the bytes of a PNG or JPEG file, of at most `pixels`. `steps`: a pipeline's document.

    Without steps, and without a program that goes before (`Program.before`), an image becomes float32 from 0 to 1,
    (1, channels, height, width), and any other input stays. `shape` is what the program takes, None is any size.
    """

    image: bool = False
    pixels: int = 0
    steps: Mapping[str, Any] | None = None
    shape: Sequence[int | None] | None = None

    def request(self) -> dict[str, Any]:
        """For the frame's header."""
        return {
            "image": self.image,
            "pixels": self.pixels,
            "steps": self.steps,
            "shape": self.shape and list(self.shape),
        }


def misfit(given: Sequence[int], expected: Sequence[int | None] | None) -> str:
    """Why an input of this shape can't be given to the model; empty if it can."""
    wrong = ""
    if 0 in given:
        wrong = "it is empty"
    elif expected and len(expected) != len(given):
        wrong = f"it has {len(given)} dimensions instead of {len(expected)}"
    elif expected:
        for at, (got, wanted) in enumerate(zip(given, expected, strict=True)):
            if wanted is not None and got != wanted:
                wrong = f"dimension {at} is {got} instead of {wanted}"
                break
    if not wrong:
        return ""
    shape = f"; the model takes {list(expected)}, null is any size" if expected else ""
    return f"{list(given)}: {wrong}{shape}"
