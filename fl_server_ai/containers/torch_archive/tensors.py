"""Tensors as torch pickles them: a storage, and how to look at it. Every claim is checked against the archive."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fl_server_ai.containers.canonical import DTYPE_BYTES, MAX_COUNT, check_shape
from fl_server_ai.containers.torch_archive.archive import Archive, Entry
from fl_server_ai.containers.torch_archive.records import (
    Global,
    Made,
    Pairs,
    Persistent,
    items_of,
    kind_of,
)
from fl_server_core.exceptions import BadContainer

# The class of a storage says its dtype; newer dtypes have none, and the tensor names its own.
STORAGES: Mapping[str, str] = {
    "torch.FloatStorage": "F32", "torch.DoubleStorage": "F64", "torch.HalfStorage": "F16",
    "torch.BFloat16Storage": "BF16", "torch.LongStorage": "I64", "torch.IntStorage": "I32",
    "torch.ShortStorage": "I16", "torch.CharStorage": "I8", "torch.ByteStorage": "U8",
    "torch.BoolStorage": "BOOL", "torch.ComplexFloatStorage": "C64",
    "torch.storage.UntypedStorage": "U8", "torch.UntypedStorage": "U8",
}  # fmt: skip
DTYPES: Mapping[str, str] = {
    "torch.float32": "F32", "torch.float64": "F64", "torch.float16": "F16", "torch.bfloat16": "BF16",
    "torch.int64": "I64", "torch.int32": "I32", "torch.int16": "I16", "torch.int8": "I8",
    "torch.uint8": "U8", "torch.uint16": "U16", "torch.uint32": "U32", "torch.uint64": "U64",
    "torch.bool": "BOOL", "torch.complex64": "C64", "torch.float8_e5m2": "F8_E5M2",
    "torch.float8_e4m3fn": "F8_E4M3",
}  # fmt: skip
WRAPPED = frozenset(
    {"torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"}
)
TYPED = frozenset({"torch._tensor._rebuild_from_type_v2", "torch._tensor._rebuild_from_type"})
DEEPEST = 8  # wrappers around one tensor


class UnsupportedTensor(BadContainer):
    """A tensor that is no plain array of numbers."""

    code = "UNSUPPORTED_TENSOR"


@dataclass(frozen=True)
class View:
    """A tensor's numbers in a storage. `offset` in bytes from the storage's start, `strides` in bytes."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    @property
    def count(self) -> int:
        """Of numbers."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def nbytes(self) -> int:
        """Of the tensor, which may be less or more than it spans."""
        return self.count * DTYPE_BYTES[self.dtype]

    @property
    def span(self) -> tuple[int, int]:
        """The bytes of the storage between which the numbers lie."""
        if not self.count:
            return self.offset, self.offset
        steps = zip(self.shape, self.strides, strict=True)
        last = sum((size - 1) * stride for size, stride in steps)
        return self.offset, self.offset + last + DTYPE_BYTES[self.dtype]

    @property
    def distinct(self) -> bool:
        """Whether each number has a place of its own, as far as the strides alone can tell."""
        extent = DTYPE_BYTES[self.dtype]
        for stride, size in sorted(zip(self.strides, self.shape, strict=True)):
            if size > 1:
                if stride < extent:
                    return False
                extent = stride * size
        return True

    @property
    def contiguous(self) -> bool:
        """Whether the numbers lie back to back in C order."""
        expected = DTYPE_BYTES[self.dtype]
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != expected:
                return not self.count
            expected *= size
        return True


def is_tensor(value: Any) -> bool:
    """Whether the program would have made a tensor of some sort."""
    return isinstance(value, Made) and (
        value.function.path in TYPED or value.function.path.startswith("torch._utils._rebuild_")
    )


def view_of(value: Any, name: str, archive: Archive) -> View:
    """The tensor `name`. Raises `UnsupportedTensor`, or `BadContainer` for one that can't be honest."""
    for _ in range(DEEPEST):
        function, arguments = value.function.path, value.arguments
        if type(arguments) is not tuple or value.changed:
            raise BadContainer(f"tensor {name!r} is not described as torch does")
        if function in WRAPPED and arguments:
            value = arguments[0]
        elif function in TYPED and len(arguments) > 2 and isinstance(arguments[0], Global):
            value = Made(arguments[0], arguments[2])
        else:
            break
        if not is_tensor(value):
            raise BadContainer(f"tensor {name!r} holds a {kind_of(value)}")
    if function == "torch._utils._rebuild_tensor_v2" and 6 <= len(arguments) <= 7:
        dtype, metadata = None, arguments[6:]
    elif function == "torch._utils._rebuild_tensor_v3" and 7 <= len(arguments) <= 8:
        dtype, metadata = arguments[6], arguments[7:]
    else:
        raise UnsupportedTensor(
            f"tensor {name!r} is sparse, quantized or of a kind that is not read here ({function})"
        )
    if metadata and not (isinstance(metadata[0], Pairs) and not metadata[0].pairs):
        raise UnsupportedTensor(f"tensor {name!r} is a lazy conjugate or negative; resolve it")
    return _view(name, arguments[:4], dtype, archive)


def _view(name: str, arguments: tuple[Any, ...], dtype: Any, archive: Archive) -> View:
    reference, offset, sizes, steps = arguments
    entry, key, stored = _storage(name, reference, archive)
    if dtype is not None:
        stored = DTYPES.get(dtype.path, "") if isinstance(dtype, Global) else ""
        if not stored:
            raise UnsupportedTensor(f"tensor {name!r} has a dtype that is not read here")
    width = DTYPE_BYTES[stored]
    shape = check_shape(name, items_of(sizes), archive.limits)
    strides = items_of(steps) or []
    if len(strides) != len(shape) or not all(_whole(number) for number in [*strides, offset]):
        raise BadContainer(f"tensor {name!r} has no valid strides or offset")
    view = View(key, stored, shape, tuple(step * width for step in strides), offset * width)
    if view.count and view.span[1] > entry.size:
        raise BadContainer(
            f"tensor {name!r} ends at byte {view.span[1]:,} of a storage of {entry.size:,}"
        )
    return view


def _whole(number: Any) -> bool:
    return type(number) is int and 0 <= number <= MAX_COUNT


def _storage(name: str, reference: Any, archive: Archive) -> tuple[Entry, str, str]:
    """The archive's entry, its key, and the dtype that the storage's class says."""
    told = reference.id if isinstance(reference, Persistent) else None
    if type(told) is not tuple or len(told) != 5 or told[0] != "storage":
        raise BadContainer(f"tensor {name!r} lies in no storage of this archive")
    _, cls, key, location, count = told
    if type(key) is not str or type(location) is not str or type(count) is not int:
        raise BadContainer(f"tensor {name!r} lies in a storage that is described wrongly")
    if not isinstance(cls, Global) or cls.path not in STORAGES:
        raise UnsupportedTensor(
            f"tensor {name!r} has a dtype that is not read here: {kind_of(cls)}"
        )
    dtype = STORAGES[cls.path]
    if location == "meta":
        raise UnsupportedTensor(f"tensor {name!r} is on the meta device: it has no numbers")
    if archive.dtypes.setdefault(key, dtype) != dtype:
        raise BadContainer(f"storage {key[:64]!r} is said to hold two dtypes")
    entry = archive.storage(key)
    if count * DTYPE_BYTES[dtype] != entry.size:
        raise BadContainer(
            f"storage {key[:64]!r} claims {count:,} numbers of {dtype}; it has {entry.size:,} bytes"
        )
    return entry, key, dtype
