"""What an update's file says of itself in `__metadata__`; all of it may be left out."""

from collections.abc import Mapping
from dataclasses import dataclass

from fl_server_core.exceptions import Unusable

KINDS = ("full", "delta", "gradient", "subset", "sparse")
ENCODINGS = ("none", "fp16", "bf16", "int8", "qsgd", "topk")
# What a kind is of use for, by what the strategy takes.
TAKEN = {
    "weights": ("full", "delta", "subset", "sparse"),
    "gradient": ("gradient",),
    "mask": ("full",),
}
MAX_LEVELS = 32_767  # what an int16 can say


@dataclass(frozen=True)
class Form:
    """`levels` is QSGD's; `base_version` the number of the version that a delta is from."""

    kind: str = "full"
    encoding: str = "none"
    base_version: int | None = None
    levels: int = 0


def form_of(metadata: Mapping[str, str], *, takes: str = "weights") -> Form:
    """Read the metadata; other keys are nobody's business. `Unusable` for what can't be done.

    A file that says nothing is of the kind that the strategy takes.
    """
    kind = metadata.get("kind", TAKEN[takes][0])
    encoding = metadata.get("encoding", "none")
    if kind not in KINDS:
        raise Unusable(
            f"updates of kind {kind[:32]!r} are not known; there are {', '.join(KINDS)}",
            code="UNKNOWN_KIND",
        )
    if encoding not in ENCODINGS:
        raise Unusable(
            f"encoding {encoding[:32]!r} is not known; there are {', '.join(ENCODINGS)}",
            code="UNKNOWN_ENCODING",
        )
    if kind not in TAKEN[takes]:
        raise Unusable(
            f"this training's strategy takes updates of kind {' or '.join(TAKEN[takes])}, not {kind}",
            code="KIND_NOT_TAKEN",
        )
    if encoding == "topk" and kind != "delta":
        raise Unusable(
            "topk leaves numbers out, so the update must be a delta; for single numbers of the "
            "weights send kind sparse",
            code="BAD_ENCODING",
        )
    return Form(kind, encoding, _whole(metadata, "base_version"), _levels(encoding, metadata))


def _whole(metadata: Mapping[str, str], key: str) -> int | None:
    text = metadata.get(key)
    if text is None:
        return None
    if not text.isascii() or not text.isdecimal() or len(text) > 9:
        raise Unusable(f"__metadata__.{key} must be a whole number", code="BAD_METADATA")
    return int(text)


def _levels(encoding: str, metadata: Mapping[str, str]) -> int:
    if encoding != "qsgd":
        return 0
    levels = _whole(metadata, "levels")
    if levels is None or not 1 <= levels <= MAX_LEVELS:
        raise Unusable(
            f"qsgd needs __metadata__.levels, 1 to {MAX_LEVELS}: s in Alistarh et al. 2017",
            code="BAD_METADATA",
        )
    return levels
