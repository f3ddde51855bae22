"""Telling torch's archives from others; older files are recognised so that the refusal can name them."""

import os
import re
from pathlib import Path

from fl_server_ai.containers.limits import Limits
from fl_server_ai.containers.zips import MAGIC, opened
from fl_server_core.exceptions import BadContainer

OLD_TORCH = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # the pickled number it begins with

EXPORTED = "a torch.export program (.pt2)"
AGAIN = "load it with a current torch and save it again with torch.save(model.state_dict(), path)"
DAMAGED = "a damaged torch.save, TorchScript or torch.export archive"
FIRST_ENTRY = re.compile(rb"PK\x03\x04.{26}[^/]+/(data\.pkl|data/0|data/weights/)", re.DOTALL)


def torch_kind(head: bytes, path: Path) -> str | None:
    """What a file of torch's, or a pickle, looks like; None for anything else. Never raises for bytes."""
    if head.startswith(OLD_TORCH):
        return (
            "a torch.save file in the format before torch 1.6, which "
            "_use_new_zipfile_serialization=False still writes"
        )
    if head[:1] == b"\x80" and head[1:2] in {b"\x02", b"\x03", b"\x04", b"\x05"}:
        return "a pickle"
    if head[:4] not in MAGIC:
        return None
    try:
        with opened(path, Limits()) as archive:
            names = {os.path.basename(name) for name in archive.namelist()}
    except BadContainer:
        damaged = FIRST_ENTRY.match(head)
        return DAMAGED if damaged else None
    if "archive_format" in names:
        return EXPORTED
    if "serialized_exported_program.json" in names:
        return "a torch.export program (.pt2) in the layout before torch 2.8"
    if "model.json" in names:
        return "a TorchScript archive in the format before torch 1.4"
    if "constants.pkl" in names:
        return "a TorchScript archive"
    if "data.pkl" in names:
        return "a torch.save archive"
    return None
