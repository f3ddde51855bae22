"""Programs that nest, multiply and claim without end, or that no pickle is."""

import functools
import struct
from collections.abc import Callable

from tests.ai.hostile.building import (
    APPEND,
    BAD,
    BUILD,
    DICT,
    DUP,
    EMPTY,
    HEADER,
    HOSTILE,
    LIST,
    MANY,
    MARK,
    MARKER,
    NEWOBJ,
    NO_STATE,
    NONE,
    POP,
    REDUCE,
    SETITEM,
    SETITEMS,
    STOP,
    TUPLE,
    TUPLE1,
    TUPLE2,
    UNSUPPORTED,
    get,
    hostile,
    listed,
    module,
    named,
    number,
    pairs,
    path,
    program,
    put,
    saved,
    saved_parts,
    state_dict,
    tensor,
    text,
    zipped,
)  # fmt: skip

MARK_PATH = text(str(MARKER))


def structure(name: str, *codes: str) -> Callable[[Callable[[], bytes]], object]:
    """What the function builds is the value of the file."""

    def add(build: Callable[[], bytes]) -> object:
        return hostile(name, *codes)(lambda: saved(build(), protocol=5))

    return add


def bare(name: str, *codes: str) -> Callable[[Callable[[], bytes]], object]:
    """What the function builds is the whole program."""

    def add(build: Callable[[], bytes]) -> object:
        return hostile(name, *codes)(lambda: zipped(*saved_parts(build())))

    return add


NESTED = EMPTY + TUPLE1 * 1_000_000
STRUCTURES: dict[str, tuple[Callable[[], bytes], tuple[str, ...]]] = {
    "a list in itself": (lambda: put(LIST, 0) + get(0) + APPEND, (NO_STATE,)),
    "a dict in itself": (lambda: put(DICT, 0) + text("w") + get(0) + SETITEM, (NO_STATE,)),
    "a dict as its own key": (lambda: put(DICT, 0) + get(0) + tensor() + SETITEM, (NO_STATE, HOSTILE)),
    "a tuple in itself": (
        lambda: put(LIST, 0) + put(get(0) + TUPLE1, 1) + POP + get(1) + APPEND, (NO_STATE,),
    ),
    "a dict as a key": (lambda: pairs((DICT, tensor())), (NO_STATE, HOSTILE)),
    "a list as a key": (lambda: pairs((LIST, tensor())), (NO_STATE, HOSTILE)),
    "a million nested tuples": (lambda: state_dict(x=NESTED), (NO_STATE, HOSTILE)),
    "a million nested tuples as a key": (lambda: pairs((NESTED, tensor())), (NO_STATE, HOSTILE)),
    "nested tuples that multiply as a key": (
        lambda: pairs((EMPTY + (DUP + TUPLE2) * 200_000, tensor())), (NO_STATE, HOSTILE),
    ),
    "tuples of 2^64 as a size": (
        lambda: state_dict(x=tensor(size=EMPTY + (DUP + TUPLE2) * 64)), (BAD, HOSTILE),
    ),
    "lists of ten that multiply": (
        lambda: text("lol") + b"".join(
            put(b"", i) + POP + LIST + MARK + get(i) * 10 + b"e" for i in range(20)
        ), (NO_STATE,),
    ),
    "sizes within sizes": (
        lambda: state_dict(
            x=tensor(size=path("torch", "Size") * 50_000 + EMPTY + (TUPLE1 + REDUCE) * 50_000)
        ), (BAD, HOSTILE),
    ),
    "wrappers around a tensor, ten thousand": (
        lambda: state_dict(
            x=path("torch._utils", "_rebuild_parameter") * 10_000 + tensor()
            + (TUPLE1 + REDUCE) * 10_000
        ), (BAD, HOSTILE, UNSUPPORTED),
    ),
    "a million empty lists": (lambda: listed(LIST * 1_000_000), (HOSTILE,)),
    "three hundred thousand names": (lambda: listed(path("hospital", "A") * 300_000), (HOSTILE,)),
    "a million memo entries": (
        lambda: NONE + b"".join(b"r" + struct.pack("<I", 2**31 + i) for i in range(1_000_000)) + POP
        + state_dict(), (HOSTILE,),
    ),
    "a million short texts": (lambda: listed(b"\x8c\x02ab" * 1_000_000), (HOSTILE,)),
    "a text of seven million characters": (lambda: state_dict(x=text("x" * 7_000_000)), (HOSTILE, NO_STATE)),
    "a text of two million wide characters": (
        lambda: state_dict(x=text("\U0001f600" * 1_900_000)), (HOSTILE, NO_STATE),
    ),
    "an integer of seven megabytes": (
        lambda: state_dict(x=b"\x8b" + struct.pack("<I", 7_000_000) + b"\x7f" * 7_000_000),
        (HOSTILE, NO_STATE),
    ),
    "a decimal integer of seven megabytes": (
        lambda: state_dict(x=b"L" + b"9" * 7_000_000 + b"L\n"), (HOSTILE,),
    ),
}  # fmt: skip
for _name, (_build, _codes) in STRUCTURES.items():
    structure(_name, *_codes)(_build)


def shared(levels: int, times: int, last: bytes) -> bytes:
    """Modules within modules: each level holds the next one, by the memo, `times` times."""
    value = put(last, 0)
    for level in range(1, levels):
        held = named({str(i): get(level - 1) for i in range(times)})
        value += POP + put(module({"_modules": held}), level)
    return value


@structure("modules that multiply to 10^20", BAD, "TOO_MANY_TENSORS")
def multiplying() -> bytes:
    return shared(20, 10, module({"_parameters": DICT}))


@structure("a module in itself", BAD)
def module_in_itself() -> bytes:
    start = put(path("hospital.models", "Net") + EMPTY + NEWOBJ, 0)
    inner = {"_parameters": DICT, "_buffers": DICT, "_modules": named({"me": get(0)})}
    return start + named(inner) + BUILD


@structure("a module in itself, under three thousand names", BAD, HOSTILE)
def module_in_itself_often() -> bytes:
    start = put(path("hospital.models", "Net") + EMPTY + NEWOBJ, 0)
    held = named({f"{i:030d}": get(0) for i in range(3_000)})
    return start + named({"_parameters": DICT, "_buffers": DICT, "_modules": held}) + BUILD


@structure("one module with twenty thousand empty parameters, 2^16 times", BAD, HOSTILE, MANY)
def empty_parameters() -> bytes:
    last = module({"_parameters": named({str(i): NONE for i in range(20_000)})})
    return shared(17, 2, last)


@structure("a hundred modules deep", BAD)
def deep_modules() -> bytes:
    return shared(100, 1, module())


CLAIMS: dict[str, bytes] = {
    "an empty program": b"",
    "only a STOP": STOP,
    "only a protocol": b"\x80\x02",
    "no STOP": program(state_dict())[:-1],
    "two values": program(NONE + state_dict()),
    "too few values": program(TUPLE1),
    "a key without a value": program(DICT + text("w") + SETITEM),
    "three parts for a dict": program(DICT + MARK + text("w") + tensor() + text("x") + SETITEMS),
    "a mark taken for a value": program(MARK + TUPLE1),
    "a mark dropped": program(state_dict() + MARK + POP),
    "a mark doubled": program(MARK + DUP + TUPLE + TUPLE),
    "a hundred thousand marks": program(MARK * 100_000 + state_dict()),
    "eight megabytes of NONE": program(NONE * 8_000_000 + state_dict()),
    "eight megabytes of PROTO": program(b"\x80\x02" * 4_000_000 + state_dict()),
    "a value recalled that was never stored": program(get(5)),
    "an index of 2^32 and nothing on the stack": program(b"r\xff\xff\xff\xff"),
    "text beyond the end": program(b"X\xff\xff\xff\x7f" + b"x"),
    "text of 2^40 bytes": program(b"\x8d" + struct.pack("<Q", 2**40) + b"x"),
    "text of 2^63 bytes": program(b"\x8d" + struct.pack("<Q", 2**63) + b"x"),
    "bytes of 2^40": program(b"\x8e" + struct.pack("<Q", 2**40) + b"x"),
    "a bytearray": program(state_dict(_extra_state=b"\x96" + struct.pack("<Q", 1) + b"x"), 5),
    "a bytearray of 2^40": program(b"\x96" + struct.pack("<Q", 2**40) + b"x", 5),
    "a buffer out of band": program(state_dict(_extra_state=b"\x97"), 5),
    "a buffer that is read only": program(state_dict(_extra_state=NONE + b"\x98"), 5),
    "an integer of 2^31 bytes": program(b"\x8b\xff\xff\xff\x7f" + b"x"),
    "an integer of minus one byte": program(b"\x8b\xff\xff\xff\xff" + b"x"),
    "a frame of 2^60 bytes and no end": b"\x80\x04\x95" + struct.pack("<Q", 2**60) + NONE,
    "text that is no UTF-8": program(b"X\x02\x00\x00\x00\xff\xfe"),
    "text with an unknown escape": program(b"S'\\q'\n" + POP + state_dict()),
    "an opcode that does not exist": program(b"\xff" + state_dict()),
    "a protocol that does not exist, text opcodes": b"\x80\x63" + b"I1\n.",
    "a list that takes items as a dict": program(LIST + text("w") + tensor() + SETITEM),
    "a dict that takes items as a list": program(DICT + tensor() + APPEND),
    "a tuple with a state": program(EMPTY + DICT + BUILD),
    "a name with a state": program(path("hospital.models", "Net") + DICT + BUILD),
}  # fmt: skip
for _name, _value in CLAIMS.items():
    bare(_name, HOSTILE)(functools.partial(bytes, _value))


@bare("an index of 2^32 in the memo, and not a word of weights", NO_STATE)
def long_index() -> bytes:
    return program(NONE + b"r\xff\xff\xff\xff")


@bare("a program of seventeen megabytes", HEADER)
def long_program() -> bytes:
    return program(NONE * 17 * 2**20)


@bare("a checkpoint", NO_STATE)
def checkpoint() -> bytes:
    return program(named({"epoch": number(3), "model": state_dict()}))


@bare("a number", NO_STATE)
def a_number() -> bytes:
    return program(number(3))
