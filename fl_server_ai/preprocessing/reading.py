"""Which kind of preprocessing an uploaded file is: a pipeline, transforms that become one, or what is kept as it is."""

from pathlib import Path

from fl_server_ai.containers import Limits
from fl_server_ai.containers.unread import OLD_TORCH, torch_kind
from fl_server_ai.preprocessing.pipeline import LARGEST_TEXT, Pipeline, parse_text
from fl_server_ai.preprocessing.translation import (
    read_pickle,
    transforms_in,
    transforms_in_archive,
    translated,
)
from fl_server_core.exceptions import UnknownContainer

HEAD = 256
ACCEPTED = (
    "preprocessing is a JSON pipeline, torchvision's v2 transforms from torch.save or pickle, or a TorchScript "
    "module"
)


def read_pipeline(path: Path, limits: Limits) -> Pipeline | None:
    """The pipeline in a file; None for files of tensors and TorchScript, which others check.

    Raises `Invalid` with BAD_PREPROCESSING, TRANSFORMS_V1 or UNKNOWN_TRANSFORM, `UnknownContainer` for a pickle of
    something else, and `BadContainer` for hostile ones.
    """
    with path.open("rb") as file:
        head = file.read(HEAD)
    # safetensors files may begin with a brace, too: with the lowest byte of a length, whose highest are 0.
    if head.lstrip()[:1] in (b"{", b"[") and b"\0" not in head[:8]:
        with path.open("rb") as file:
            return parse_text(file.read(LARGEST_TEXT + 1))
    kind = torch_kind(head, path)
    if kind == "a torch.save archive":
        transforms = transforms_in_archive(path, limits)
        return translated(transforms) if transforms else None
    if kind == "a pickle" and not head.startswith(OLD_TORCH):
        transforms = transforms_in(read_pickle(path, limits))
        if transforms is None:
            raise UnknownContainer(f"this is a pickle of something else; {ACCEPTED}")
        return translated(transforms)
    return None
