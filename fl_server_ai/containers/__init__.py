"""Foreign bytes become canonical weights here and nowhere else; nothing in them is ever executed.

Start reading here. One module a container, each with a `Container` registered by name and found by
its first bytes: a new one is a new file in this folder.

- `seam.py`         sniff, extract, write back: all that the rest of the server calls
- `container.py`    what a container module implements
- `safetensors.py`  safetensors files in any order, with or without metadata
- `npz.py`          numpy's zip archives, without pickle; `npy.py` reads one array's header
- `zips.py`         opening a zip archive that may be hostile
- `torch_save.py`   what torch.save writes; `torchscript.py` what torch.jit.save writes;
                    `torch_export.py` what torch.export.save writes: all by `torch_archive/`,
                    which runs nothing and needs no torch
- `unread.py`       tells torch's archives from others, and names older files in the refusal
- `canonical.py`    the one form that weights are kept in; `header.py` reads its JSON by strict rules
- `writing.py`      canonical files, written in constant memory
- `checks.py`       against the global model's header; for NaN and infinity
- `limits.py`       how large anything may claim to be
"""

from fl_server_ai.containers.canonical import (
    DTYPE_BYTES,
    Manifest,
    TensorInfo,
    canonical_header,
    read_manifest,
)
from fl_server_ai.containers.checks import check_against, check_finite, check_some, check_ties
from fl_server_ai.containers.limits import Limits
from fl_server_ai.containers.seam import Extracted, extract, sniff, template_ties, write_back

__all__ = [
    "DTYPE_BYTES",
    "Extracted",
    "Limits",
    "Manifest",
    "TensorInfo",
    "canonical_header",
    "check_against",
    "check_finite",
    "check_some",
    "check_ties",
    "extract",
    "read_manifest",
    "sniff",
    "template_ties",
    "write_back",
]
