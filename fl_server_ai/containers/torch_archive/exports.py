"""What a `torch.export` archive may hold, and its tensors by name; nothing that torch would unpickle is let through.

Its state dict, which is parameters and persistent buffers, is the weights. Constants and buffers that are not
persistent lie beside them and stay as they are. Both are raw storages that a JSON table describes; the graph
(`models/model.json`) is not read here: `fl_server_ai/sandbox/exported.py` checks it before it is run.
"""

import re
from typing import Any

from fl_server_ai.containers.canonical import DTYPE_BYTES, MAX_COUNT, check_shape
from fl_server_ai.containers.header import Reader, check_name
from fl_server_ai.containers.torch_archive.archive import Archive
from fl_server_ai.containers.torch_archive.tensors import UnsupportedTensor, View
from fl_server_core.exceptions import BadContainer, TooLarge

FORMAT, MODEL = "archive_format", "models/model.json"
WEIGHTS, CONSTANTS = (
    "data/weights/model_weights_config.json",
    "data/constants/model_constants_config.json",
)
CONFIGS = (WEIGHTS, CONSTANTS)
PLAIN = frozenset({FORMAT, "archive_version", "byteorder", ".data/version"})
NUMBERS = re.compile(r"data/(?:weights/weight|constants/tensor)_\d{1,6}", re.ASCII)
# Written by torch or allowed by it, and given to nobody.
IGNORED = re.compile(r"data/sample_inputs/model\.pt|\.data/serialization_id|extra/[^\0]*")
MODEL_BYTES = 64 * 2**20
LAID_OUT = {"archive_format": b"pt2", "archive_version": b"0"}

# One tensor's object holds objects (tensor_meta), which hold objects (sizes); braces in texts are refused.
PAYLOAD = re.compile(r"\{(?:[^{}]++|\{(?:[^{}]++|\{[^{}]*+\})*+\})*+\}")
LONGEST = 16_384  # characters of one tensor's description
PLACE = {WEIGHTS: re.compile(r"weight_\d{1,6}", re.ASCII),
         CONSTANTS: re.compile(r"tensor_\d{1,6}", re.ASCII)}  # fmt: skip
FIELDS = {"path_name", "is_param", "use_pickle", "tensor_meta"}
META = {"dtype", "sizes", "requires_grad", "device", "strides", "storage_offset", "layout"}
# torch/_export/serde/schema.py, ScalarType.
DTYPES = {
    1: "U8", 2: "I8", 3: "I16", 4: "I32", 5: "I64", 6: "F16", 7: "F32", 8: "F64", 10: "C64",
    12: "BOOL", 13: "BF16", 28: "U16", 29: "F8_E4M3", 30: "F8_E5M2", 34: "U32", 35: "U64",
}  # fmt: skip
STRIDED = 7


class PickledEntry(BadContainer):
    """An entry that torch would unpickle, which can run any code."""

    code = "PICKLED_ENTRY"


def check_entries(archive: Archive) -> None:
    """Raise `PickledEntry` for entries that torch would unpickle or run, `BadContainer` for an unknown layout."""
    for name, entry in archive.entries.items():
        known = name in PLAIN or name in CONFIGS or name == MODEL
        if not (known or NUMBERS.fullmatch(name) or IGNORED.fullmatch(name)):
            raise PickledEntry(
                f"the archive's entry {name[:80]!r} is none that is read here: torch would unpickle it or "
                "run it; export plain tensors only, with torch.export.save of torch 2.8 or later"
            )
        if not entry.stored:
            raise BadContainer(f"{name[:80]!r} is compressed; torch stores it as it is")
    for name, wanted in LAID_OUT.items():
        found = archive.read(name, 64)
        if found.strip() != wanted:
            raise BadContainer(
                f"{name} is {found[:16]!r}; {wanted!r} is read here, as torch 2.8 and later write it",
                code="UNSUPPORTED_LAYOUT",
            )
    model = archive.entries.get(MODEL)
    if model is None:
        raise BadContainer(f"the archive has no {MODEL!r}; save one program, by torch.export.save")
    if model.size > MODEL_BYTES:
        raise TooLarge(
            f"the program's graph has {model.size:,} bytes; {MODEL_BYTES:,} are allowed",
            code="HEADER_TOO_LARGE",
        )


def exported_views(archive: Archive) -> dict[str, View]:
    """The weights by name, in the archive's order; its entries and both of its tables are checked."""
    check_entries(archive)
    views = {table: table_views(archive, table) for table in CONFIGS}
    return views[WEIGHTS]


def table_views(archive: Archive, table: str) -> dict[str, View]:
    """The tensors that one of `CONFIGS` describes: each plain, with a dtype, and within its storage."""
    found: dict[str, View] = {}
    try:
        text = archive.read(table, archive.limits.header_bytes).decode()
    except UnicodeDecodeError as error:
        raise BadContainer(f"{table} is not UTF-8") from error
    reader = Reader(text)
    tables = 0
    for key in reader.each_key():
        tables += 1
        if key != "config" or tables > 1:
            raise BadContainer(f"{table} has a member {key[:64]!r} too many")
        _table(reader, archive, table, found)
    if not tables:
        raise BadContainer(f"{table} does not say which entry holds which tensor")
    if reader.skip() != len(text):
        raise BadContainer(f"{table} goes on after its JSON object")
    return found


def _table(reader: Reader, archive: Archive, table: str, found: dict[str, View]) -> None:
    for name in reader.each_key():
        check_name(name, archive.limits)
        if name in found:
            raise BadContainer(f"the tensor name {name!r} occurs twice")
        if len(found) == archive.limits.tensors:
            raise BadContainer(
                f"more than {archive.limits.tensors:,} tensors are not allowed",
                code="TOO_MANY_TENSORS",
            )
        found[name] = _view(archive, table, name, reader.entry(name, PAYLOAD, LONGEST))


def _view(archive: Archive, table: str, name: str, payload: dict[str, Any]) -> View:
    if payload.get("use_pickle") is not False:
        raise PickledEntry(
            f"{name[:64]!r} is stored as a pickle (use_pickle); export plain tensors only"
        )
    place = payload.get("path_name")
    if not isinstance(place, str) or not PLACE[table].fullmatch(place):
        raise PickledEntry(f"{name[:64]!r} lies in {str(place)[:64]!r}, which torch would unpickle")
    meta = payload.get("tensor_meta")
    if payload.keys() != FIELDS or type(payload["is_param"]) is not bool:
        raise BadContainer(f"tensor {name!r} is not described as torch does")
    if not isinstance(meta, dict) or meta.keys() != META or type(meta["requires_grad"]) is not bool:
        raise BadContainer(f"tensor {name!r} is not described as torch does")
    dtype = DTYPES.get(meta["dtype"]) if type(meta["dtype"]) is int else None
    if dtype is None or meta["layout"] != STRIDED or type(meta["layout"]) is not int:
        raise UnsupportedTensor(
            f"tensor {name!r} is sparse, quantized or has a dtype that is not read here"
        )
    device = meta["device"].get("type") if isinstance(meta["device"], dict) else None
    if device not in {"cpu", "cuda"}:
        raise UnsupportedTensor(
            f"tensor {name!r} is on the device {str(device)[:16]!r}; export the program on the CPU"
        )
    key = f"{table.split('/')[1]}/{place}"
    width, entry = DTYPE_BYTES[dtype], archive.storage(key)
    shape = check_shape(name, _numbers(name, meta["sizes"]), archive.limits)
    strides = _numbers(name, meta["strides"])
    (offset,) = _numbers(name, [meta["storage_offset"]])
    if len(strides) != len(shape):
        raise BadContainer(f"tensor {name!r} has no valid strides or offset")
    if archive.dtypes.setdefault(key, dtype) != dtype or entry.size % width:
        raise BadContainer(f"storage {place} is said to hold another dtype than it does")
    view = View(key, dtype, shape, tuple(step * width for step in strides), offset * width)
    if view.count and view.span[1] > entry.size:
        raise BadContainer(
            f"tensor {name!r} ends at byte {view.span[1]:,} of a storage of {entry.size:,}"
        )
    return view


def _numbers(name: str, members: Any) -> list[int]:
    """What torch writes as `[{"as_int": 3}]`; weights have no symbolic sizes."""
    numbers = []
    for member in members if isinstance(members, list) else [None]:
        number = member.get("as_int") if isinstance(member, dict) and len(member) == 1 else None
        if type(number) is not int or not 0 <= number <= MAX_COUNT:
            raise BadContainer(f"tensor {name!r} has no valid shape, strides or offset")
        numbers.append(number)
    return numbers
