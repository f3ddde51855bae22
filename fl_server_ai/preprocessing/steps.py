"""The steps of a pipeline: names, options and limits. Their meaning is that of torchvision's v2 transforms on tensors.

A step takes images as (batch, channels, height, width) and gives such a tensor again; only `flatten` doesn't.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

LARGEST = 16_384  # pixels of an edge
CHANNELS = 256
INTERPOLATIONS = ("nearest", "nearest-exact", "bilinear", "bicubic")
SMOOTH = ("bilinear", "bicubic")
DTYPES = ("uint8", "int32", "int64", "float16", "bfloat16", "float32", "float64")
SCALED = ("uint8", "float16", "bfloat16", "float32", "float64")
EDGE = {"ge": 1, "le": LARGEST}

Fault = tuple[str, str, str]  # where in the step, code, detail


@dataclass(frozen=True)
class Step:
    """One step; what is wrong with its options together is in `faults`."""

    def faults(self) -> Iterator[Fault]:
        yield from ()


@dataclass(frozen=True)
class ToImage(Step):
    """Nothing: an image file comes as the numbers that are in it, uint8. `v2.ToImage`, `v2.PILToTensor`."""


@dataclass(frozen=True)
class ToTensor(Step):
    """uint8 becomes float32 from 0 to 1; other dtypes stay as they are. `v2.ToTensor`."""


@dataclass(frozen=True)
class Resize(Step):
    """To another size, computed in float32 where the images are not float; integers are rounded. `v2.Resize`."""

    size: int | list[int] = field(
        metadata={
            **EDGE,
            "items": (1, 2),
            "doc": "[height, width]; one number is the shorter edge, and the ratio stays.",
        }
    )
    interpolation: str = field(
        default="bilinear",
        metadata={"choices": INTERPOLATIONS, "doc": "As in torch.nn.functional.interpolate."},
    )
    antialias: bool = field(
        default=True,
        metadata={"doc": "Smooth what shrinks, as Pillow does; bilinear and bicubic only."},
    )
    max_size: int | None = field(
        default=None,
        metadata={**EDGE, "doc": "The most for the longer edge, where size is one number."},
    )

    def faults(self) -> Iterator[Fault]:
        edges = self.size if isinstance(self.size, list) else [self.size]
        if self.max_size is not None and len(edges) == 2:
            yield "max_size", "contradiction", "is for a size of one number"
        elif self.max_size is not None and self.max_size <= edges[0]:
            yield "max_size", "range", "must be more than size"


@dataclass(frozen=True)
class CenterCrop(Step):
    """The middle; what is smaller gets a margin of zeros first. `v2.CenterCrop`."""

    size: int | list[int] = field(
        metadata={**EDGE, "items": (1, 2), "doc": "[height, width], or one number for a square."}
    )


@dataclass(frozen=True)
class Crop(Step):
    """A part, which must lie within the image. `v2.functional.crop`."""

    top: int = field(metadata={"ge": 0, "le": LARGEST, "doc": "Rows above it."})
    left: int = field(metadata={"ge": 0, "le": LARGEST, "doc": "Columns to its left."})
    height: int = field(metadata=EDGE)
    width: int = field(metadata=EDGE)


@dataclass(frozen=True)
class Grayscale(Step):
    """0.2989 R + 0.587 G + 0.114 B, of integers without what follows the point. `v2.Grayscale`."""

    channels: int = field(
        default=1, metadata={"choices": (1, 3), "doc": "How many times the result stands there."}
    )


@dataclass(frozen=True)
class Rgb(Step):
    """One channel becomes three alike; three or more stay. `v2.RGB`."""


@dataclass(frozen=True)
class Cast(Step):
    """Another dtype. `v2.ToDtype`, `v2.ConvertImageDtype`."""

    dtype: str = field(metadata={"choices": DTYPES, "doc": "What the numbers become."})
    scale: bool = field(
        default=False,
        metadata={
            "doc": "Also the range, 0 to 255 of uint8 to 0 to 1 of floats: divided by 255; back: times "
            "255.999, without what follows the point."
        },
    )

    def faults(self) -> Iterator[Fault]:
        if self.scale and self.dtype not in SCALED:
            yield "scale", "contradiction", f"is for {', '.join(SCALED)}"


@dataclass(frozen=True)
class Normalize(Step):
    """(x - mean) / std, for each channel; of floats, so that integers want a `cast` before. `v2.Normalize`."""

    mean: list[float] = field(
        metadata={"items": (1, CHANNELS), "doc": "One for each channel, or one for all."}
    )
    std: list[float] = field(
        metadata={"items": (1, CHANNELS), "doc": "As many, none of them 0."},
    )

    def faults(self) -> Iterator[Fault]:
        for index, value in enumerate(self.std):
            if value == 0:
                yield f"std/{index}", "range", "must not be 0: it is divided by"
        if len(self.mean) != len(self.std):
            yield "std", "length", f"must have as many numbers as mean, {len(self.mean)}"


@dataclass(frozen=True)
class Flatten(Step):
    """(batch, channels * height * width), for models that take rows of numbers. Nothing can follow it."""


STEPS: Mapping[str, type[Any]] = {
    "to_image": ToImage, "to_tensor": ToTensor, "resize": Resize, "center_crop": CenterCrop, "crop": Crop,
    "grayscale": Grayscale, "rgb": Rgb, "cast": Cast, "normalize": Normalize, "flatten": Flatten,
}  # fmt: skip
NAMES: Mapping[type[Any], str] = {kind: name for name, kind in STEPS.items()}
