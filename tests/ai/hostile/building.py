"""Pickle opcodes, zip records and honest files: what hostile files are put together from."""

import functools
import os
import struct
import tempfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

# Every call in the corpus that can create a file would create this one.
MARKER = Path(tempfile.gettempdir()) / f"fl-hostile-{os.getpid()}"
TOUCH = f"touch {MARKER}"

HOSTILE, BAD, UNSUPPORTED = "HOSTILE_PICKLE", "BAD_CONTAINER", "UNSUPPORTED_TENSOR"
NO_STATE, TOO_LARGE, HEADER = "NOT_A_STATE_DICT", "TOO_LARGE", "HEADER_TOO_LARGE"
MANY, OPERATOR, UNKNOWN = "TOO_MANY_TENSORS", "FORBIDDEN_OPERATOR", "UNKNOWN_CONTAINER"


@dataclass(frozen=True)
class HostileFile:
    """`armed`: unpickling its program creates the marker, which a test proves."""

    name: str
    codes: frozenset[str]
    build: Callable[[], bytes] = field(repr=False)
    armed: bool = False


CORPUS: dict[str, HostileFile] = {}
HONEST: dict[str, Callable[[], bytes]] = {}  # must be read, or refusals would prove nothing


def hostile(
    name: str, *codes: str, armed: bool = False
) -> Callable[[Callable[[], bytes]], Callable[[], bytes]]:
    """Add what the function builds to the corpus."""

    def add(build: Callable[[], bytes]) -> Callable[[], bytes]:
        assert name not in CORPUS, name
        CORPUS[name] = HostileFile(name, frozenset(codes), build, armed)
        return build

    return add


# Opcodes. Each function gives the bytes that put one value on the stack.

NONE, TRUE, FALSE, EMPTY, LIST, DICT, SET = b"N", b"\x88", b"\x89", b")", b"]", b"}", b"\x8f"
MARK, STOP, REDUCE, BUILD, POP, DUP, PERSID = b"(", b".", b"R", b"b", b"0", b"2", b"Q"
APPEND, SETITEM, SETITEMS, TUPLE, TUPLE1, TUPLE2 = b"a", b"s", b"u", b"t", b"\x85", b"\x86"
NEWOBJ, NEWOBJ_EX, STACK_GLOBAL, MEMOIZE = b"\x81", b"\x92", b"\x93", b"\x94"


def text(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value: int) -> bytes:
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def real(value: float) -> bytes:
    return b"G" + struct.pack(">d", value)


def blob(value: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(value)) + value


def several(*values: bytes) -> bytes:
    """A tuple."""
    return MARK + b"".join(values) + TUPLE


def numbers(*values: int) -> bytes:
    return several(*map(number, values))


def listed(*values: bytes) -> bytes:
    return LIST + MARK + b"".join(values) + b"e"


def pairs(*items: tuple[bytes, bytes]) -> bytes:
    """A dict."""
    return DICT + MARK + b"".join(key + value for key, value in items) + SETITEMS


def named(items: Mapping[str, bytes]) -> bytes:
    return pairs(*((text(key), value) for key, value in items.items()))


def path(module: str, name: str) -> bytes:
    """A global in protocol 2's way."""
    return b"c" + module.encode() + b"\n" + name.encode() + b"\n"


def stacked(module: str, name: str) -> bytes:
    """A global in protocol 4's way, in which dots reach into attributes."""
    return text(module) + text(name) + STACK_GLOBAL


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + several(*arguments) + REDUCE


def put(value: bytes, index: int) -> bytes:
    return value + b"r" + struct.pack("<I", index)


def get(index: int) -> bytes:
    return b"j" + struct.pack("<I", index)


def program(value: bytes, protocol: int = 2) -> bytes:
    return b"\x80" + bytes([protocol]) + value + STOP


# Zip records.


@dataclass
class Part:
    """One entry; whatever is not None lies."""

    name: str | bytes
    data: bytes = b""
    deflate: bool = False
    crc: int | None = None  # in both places
    size: int | None = None  # unpacked, in both places
    packed_size: int | None = None  # in both places
    local_crc: int | None = None
    local_size: int | None = None
    local_name: bytes | None = None
    offset: int | None = None  # of the local header, in the directory
    method: int | None = None
    flags: int = 0x800
    extra: bytes = b""  # local
    central_extra: bytes = b""
    after: bytes = b""  # behind the data, as a descriptor is
    listed: bool = True


def packed(data: bytes) -> bytes:
    deflater = zlib.compressobj(9, zlib.DEFLATED, -15)
    return deflater.compress(data) + deflater.flush()


@functools.cache
def zeros_packed(count: int) -> bytes:
    """A raw deflate stream of this many zeros (a multiple of a MiB), made without having them all."""
    deflater = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = bytes(2**20)
    return b"".join(deflater.compress(block) for _ in range(count // len(block))) + deflater.flush()


def zipped(
    *parts: Part,
    comment: bytes = b"",
    entries: int | None = None,
    directory_size: int | None = None,
    directory_offset: int | None = None,
    end: Callable[[int, int, int], bytes] | None = None,
) -> bytes:
    """An archive of these parts. `end` makes the records after the directory: entries, size, offset."""
    body, central = bytearray(), bytearray()
    for part in parts:
        name = part.name if isinstance(part.name, bytes) else part.name.encode()
        data = packed(part.data) if part.deflate else part.data
        method = (8 if part.deflate else 0) if part.method is None else part.method
        crc = zlib.crc32(part.data) if part.crc is None else part.crc
        size = len(part.data) if part.size is None else part.size
        packed_size = len(data) if part.packed_size is None else part.packed_size
        local_name = name if part.local_name is None else part.local_name
        offset = len(body) if part.offset is None else part.offset
        body += b"PK\x03\x04" + struct.pack(
            "<HHHHHIIIHH", 20, part.flags, method, 0, 33,
            crc if part.local_crc is None else part.local_crc, packed_size,
            size if part.local_size is None else part.local_size, len(local_name), len(part.extra),
        )  # fmt: skip
        body += local_name + part.extra + data + part.after
        if part.listed:
            central += b"PK\x01\x02" + struct.pack(
                "<HHHHHHIIIHHHHHII", 20, 20, part.flags, method, 0, 33, crc, packed_size, size,
                len(name), len(part.central_extra), 0, 0, 0, 0, offset,
            )  # fmt: skip
            central += name + part.central_extra
    count = sum(part.listed for part in parts) if entries is None else entries
    size = len(central) if directory_size is None else directory_size
    start = len(body) if directory_offset is None else directory_offset
    closing = end or (
        lambda count, size, start: (
            b"PK\x05\x06"
            + struct.pack(
                "<HHHHIIH", 0, 0, count & 0xFFFF, count & 0xFFFF, size, start, len(comment)
            )
            + comment
        )
    )
    return bytes(body + central + closing(count, size, start))


# Honest files: one tensor `w` of four numbers.

FOUR = struct.pack("<4f", 1, 2, 3, 4)
ORDERED = path("collections", "OrderedDict")


def storage(
    key: bytes | None = None,
    cls: bytes | None = None,
    count: bytes | None = None,
    location: bytes | None = None,
    kind: bytes | None = None,
) -> bytes:
    """A storage by its persistent id."""
    parts = [
        kind or text("storage"),
        cls or path("torch", "FloatStorage"),
        key or text("0"),
        location or text("cpu"),
        count or number(4),
    ]
    return several(*parts) + PERSID


def tensor(
    store: bytes | None = None,
    offset: bytes | None = None,
    size: bytes | None = None,
    stride: bytes | None = None,
    grad: bytes = FALSE,
    hooks: bytes | None = None,
    *more: bytes,
    rebuild: str = "_rebuild_tensor_v2",
) -> bytes:
    """A tensor as torch describes it; by default all four numbers."""
    return call(
        path("torch._utils", rebuild),
        store or storage(),
        offset or number(0),
        size or numbers(4),
        stride or numbers(1),
        grad,
        hooks or call(ORDERED),
        *more,
    )


def module(attributes: Mapping[str, bytes] | None = None, cls: bytes | None = None) -> bytes:
    """A whole module of a class that only its client has."""
    state = {
        "training": TRUE,
        "_parameters": call(ORDERED) + MARK + text("w") + tensor() + SETITEMS,
        "_buffers": call(ORDERED),
        "_modules": call(ORDERED),
        **(attributes or {}),
    }
    return (cls or path("hospital.models", "Net")) + EMPTY + NEWOBJ + named(state) + BUILD


def saved_parts(code: bytes, storages: Mapping[str, bytes] | None = None) -> list[Part]:
    stored = {"0": FOUR} if storages is None else storages
    return [
        Part("archive/data.pkl", code),
        Part("archive/byteorder", b"little"),
        *(Part(f"archive/data/{key}", data) for key, data in stored.items()),
        Part("archive/version", b"3\n"),
    ]


def saved(value: bytes, storages: Mapping[str, bytes] | None = None, protocol: int = 2) -> bytes:
    """What torch.save writes, of a program that leaves this value."""
    return zipped(*saved_parts(program(value, protocol), storages))


def state_dict(**values: bytes) -> bytes:
    """Honest, but for these values under other names."""
    return named({"w": tensor(), **values})


CODE = """class Net(Module):
  __parameters__ = ["w", ]
  __buffers__ = []
  w : Tensor
  training : bool
  def forward(self: __torch__.Net,
    x: Tensor) -> Tensor:
    return torch.add(x, self.w)
"""


def script_object(attributes: Mapping[str, bytes] | None = None, cls: str = "Net") -> bytes:
    state = {"w": tensor(), "training": TRUE} if attributes is None else attributes
    return path("__torch__", cls) + EMPTY + NEWOBJ + named(state) + BUILD


def script_parts(code: str | bytes = CODE, value: bytes | None = None) -> list[Part]:
    source = code.encode() if isinstance(code, str) else code
    return [
        Part("net/data.pkl", program(value or script_object())),
        Part("net/code/__torch__.py", source, deflate=True),
        Part("net/byteorder", b"little"),
        Part("net/data/0", FOUR),
        Part("net/constants.pkl", program(EMPTY)),
        Part("net/version", b"3\n"),
    ]


def scripted(code: str | bytes = CODE, value: bytes | None = None) -> bytes:
    """What torch.jit.save writes."""
    return zipped(*script_parts(code, value))


HONEST["a state dict"] = lambda: saved(state_dict())
HONEST["a state dict, protocol 4"] = lambda: saved(state_dict(), protocol=4)
HONEST["a whole module"] = lambda: saved(module())
HONEST["a script"] = scripted
HONEST["an archive of empty entries"] = lambda: zipped(
    *saved_parts(program(state_dict())), Part("archive/.data/serialization_id", b"0" * 40)
)
HONEST["a tensor of sixteen dimensions"] = lambda: saved(
    named(
        {
            "w": tensor(
                storage(count=number(2**16)),
                size=numbers(*[2] * 16),
                stride=numbers(*(2**i for i in reversed(range(16)))),
            )
        }
    ),
    {"0": bytes(2**18)},
)
