"""The dtypes, by safetensors' names, that updates can be combined in, and by which rules; known without torch."""

from fl_server_ai.containers import DTYPE_BYTES, Manifest
from fl_server_core.exceptions import Unusable

FLOAT_DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
# With the bytes of a number. Complex numbers are read and stored, but no strategy knows what to do with them.
AGGREGATED = {
    name: size
    for name, size in DTYPE_BYTES.items()
    if name in FLOAT_DTYPES or name == "BOOL" or name[0] in "UI"
}

BUFFER_POLICIES = (
    "mean",
    "max",
    "keep",
)  # for integers and bools; `integers.py` says what they are


def check_aggregated(manifest: Manifest) -> None:
    """Raise `Unusable` (DTYPE_NOT_AGGREGATED) with the first tensor that no aggregation could take."""
    for tensor in manifest.tensors:
        if tensor.dtype not in AGGREGATED:
            raise Unusable(
                f"tensor {tensor.name!r} is {tensor.dtype}; what can be aggregated is "
                + ", ".join(AGGREGATED),
                code="DTYPE_NOT_AGGREGATED",
                tensor=tensor.name,
            )
