"""Runs a pickle program without pickle: names are inert, calls are only written down.

Why not a subclass of `pickle.Unpickler`: that one allocates what ten bytes claim, and hashes what it is
given, which nested tuples turn into a crash. Here mappings are lists of pairs, nothing is hashed, and opcodes and
memory are bounded.
"""

import pickletools
from collections.abc import Callable
from functools import partial
from io import BytesIO
from typing import Any, BinaryIO

from fl_server_ai.containers.torch_archive.calls import HostilePickle, called, mentioned
from fl_server_ai.containers.torch_archive.records import Items, Made, Pairs, Persistent

MAX_OPCODES = 2_000_000
MAX_STACK = 1_000_000  # values, of eight bytes each beside their own
MAX_MEMORY = 32 * 2**20  # bytes, roughly, of everything that the program makes
MAX_INTEGER = 2**128  # a UUID; nothing that a tensor counts is larger
# Rough sizes in CPython: of a value, of a reference to it on stack, memo or in a tuple, of a container.
VALUE, REFERENCE, CONTAINER = 40, 8, 96

CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
NUMBERS = frozenset({"BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"})
TEXTS = frozenset(
    ["BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"]
)
IGNORED = frozenset({"PROTO", "FRAME"})  # a frame's size is only a hint
CODES = {opcode.name: opcode.code.encode("latin-1") for opcode in pickletools.opcodes}
# How each opcode's argument is read: never more than is there.
ARGUMENTS: dict[bytes, Callable[[Any], Any] | None] = {
    opcode.code.encode("latin-1"): opcode.arg.reader if opcode.arg else None
    for opcode in pickletools.opcodes
}
STOP = CODES["STOP"]


def _two_lines(stream: BinaryIO) -> str:
    """Module and name of GLOBAL; pickletools would undo escapes, which pickle doesn't."""
    lines = stream.readline(), stream.readline()
    if not all(line.endswith(b"\n") for line in lines):
        raise HostilePickle("the pickle ends within a name")
    return b" ".join(line[:-1] for line in lines).decode("utf-8")


ARGUMENTS[CODES["GLOBAL"]] = _two_lines


class _Mark:
    """Where a list of values begins on the stack."""


MARK = _Mark()


def interpret(program: bytes) -> Any:
    """The value that the program leaves, made of numbers, texts, tuples and the classes in `records`.

    Raises `HostilePickle` for whatever no writer of weights does, damaged programs included.
    """
    machine = Machine()
    stream = BytesIO(program)
    try:
        for _ in range(MAX_OPCODES):
            code = stream.read(1)
            if code == STOP:
                return machine.result()
            if code not in machine.carry_out:
                raise HostilePickle(_no_place(code))
            read = ARGUMENTS[code]
            machine.carry_out[code](read(stream) if read else None)
    except (ValueError, IndexError, OverflowError) as error:
        raise HostilePickle(f"the pickle is damaged: {str(error)[:100]!r}") from error
    raise HostilePickle(f"the pickle has more than {MAX_OPCODES:,} opcodes")


def _no_place(code: bytes) -> str:
    if not code:
        return "the pickle does not end"
    name = next((name for name, known in CODES.items() if known == code), repr(code))
    return f"the opcode {name} has no place in a file of weights"


class Machine:
    """Stack and memo. Each method named `op_` carries out the opcode of its name."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.memory = MAX_MEMORY
        own = {name: getattr(self, f"op_{name.lower()}", None) for name in CODES}
        own |= dict.fromkeys(NUMBERS, self._number) | dict.fromkeys(TEXTS, self._text)
        own |= {name: partial(self._constant, value) for name, value in CONSTANTS.items()}
        own |= dict.fromkeys(IGNORED, self._ignore)
        self.carry_out: dict[bytes, Callable[[Any], None]] = {
            CODES[name]: method for name, method in own.items() if method is not None
        }

    def _number(self, argument: Any) -> None:
        if type(argument) is int and abs(argument) > MAX_INTEGER:
            raise HostilePickle("the pickle holds an integer of more than 128 bits")
        small = type(argument) is int and -5 <= argument <= 256  # of these CPython keeps one each
        self.push(argument, 0 if small else VALUE)

    def _text(self, argument: Any) -> None:
        self.push(argument, VALUE + len(argument) * (1 if argument.isascii() else 4))

    def _constant(self, value: Any, _: Any) -> None:
        self.push(value, 0)

    def _ignore(self, _: Any) -> None:
        pass

    def result(self) -> Any:
        """The one value that is left."""
        value = self.pop()
        if self.stack:
            raise HostilePickle("the pickle leaves more than one value")
        return value

    def push(self, value: Any, size: int) -> None:
        """Put a value of about `size` bytes on the stack."""
        self.spend(size)
        self.stack.append(value)
        if len(self.stack) > MAX_STACK:
            raise HostilePickle(f"the pickle puts more than {MAX_STACK:,} values on its stack")

    def spend(self, size: int) -> None:
        """Count memory that is about to be used; it is never given back, so that the sum is bounded."""
        self.memory -= size
        if self.memory < 0:
            raise HostilePickle(f"the pickle makes more than {MAX_MEMORY >> 20} MiB of objects")

    def pop(self) -> Any:
        """The top value, never a mark."""
        value = self.stack.pop()
        if value is MARK:
            raise HostilePickle("the pickle takes a mark for a value")
        return value

    def top(self) -> Any:
        value = self.pop()
        self.stack.append(value)
        return value

    def to_mark(self) -> list[Any]:
        """All values above the last mark, which goes with them."""
        for index in range(len(self.stack) - 1, -1, -1):
            if self.stack[index] is MARK:
                values = self.stack[index + 1 :]
                del self.stack[index:]
                return values
        raise HostilePickle("the pickle misses a mark")

    def op_mark(self, _: Any) -> None:
        self.push(MARK, 0)

    def op_pop(self, _: Any) -> None:
        self.pop()

    def op_pop_mark(self, _: Any) -> None:
        self.to_mark()

    def op_dup(self, _: Any) -> None:
        self.push(self.top(), 0)

    # Tuples, lists, sets and dicts.

    def _tuple(self, values: list[Any]) -> None:
        self.push(tuple(values), VALUE + REFERENCE * len(values))

    def op_tuple(self, _: Any) -> None:
        self._tuple(self.to_mark())

    def op_tuple1(self, _: Any) -> None:
        self._tuple([self.pop()])

    def op_tuple2(self, _: Any) -> None:
        second, first = self.pop(), self.pop()
        self._tuple([first, second])

    def op_tuple3(self, _: Any) -> None:
        third, second, first = self.pop(), self.pop(), self.pop()
        self._tuple([first, second, third])

    def op_empty_list(self, _: Any) -> None:
        self.push(Items(), CONTAINER)

    op_empty_set = op_empty_list

    def op_empty_dict(self, _: Any) -> None:
        self.push(Pairs(), CONTAINER)

    def op_frozenset(self, _: Any) -> None:
        values = self.to_mark()
        self.push(Items(), CONTAINER)
        self._extend(values)

    op_list = op_frozenset

    def op_dict(self, _: Any) -> None:
        values = self.to_mark()
        self.push(Pairs(), CONTAINER)
        self._fill(values)

    def op_append(self, _: Any) -> None:
        self._extend([self.pop()])

    def op_appends(self, _: Any) -> None:
        self._extend(self.to_mark())

    op_additems = op_appends

    def op_setitem(self, _: Any) -> None:
        value, key = self.pop(), self.pop()
        self._fill([key, value])

    def op_setitems(self, _: Any) -> None:
        self._fill(self.to_mark())

    def _extend(self, values: list[Any]) -> None:
        target = self.top()
        if isinstance(target, Made):
            self.spend(CONTAINER)
            target.items = target.items or Items()
            target = target.items
        if not isinstance(target, Items):
            raise HostilePickle("the pickle appends to something that is no list")
        self.spend(REFERENCE * len(values))
        target.items += values

    def _fill(self, values: list[Any]) -> None:
        target = self.top()
        if isinstance(target, Made):
            self.spend(CONTAINER)
            target.pairs = target.pairs or Pairs()
            target = target.pairs
        if not isinstance(target, Pairs) or len(values) % 2:
            raise HostilePickle("the pickle fills something that is no dict")
        self.spend(VALUE * len(values))
        target.pairs += zip(values[::2], values[1::2], strict=True)

    # The memo.

    def op_binput(self, index: Any) -> None:
        self.spend(VALUE + 2 * REFERENCE)
        self.memo[index] = self.top()

    op_long_binput = op_binput

    def op_memoize(self, _: Any) -> None:
        self.op_binput(len(self.memo))

    def op_binget(self, index: Any) -> None:
        if index not in self.memo:
            raise HostilePickle("the pickle recalls what it never stored")
        self.push(self.memo[index], 0)

    op_long_binget = op_binget

    # Names and what would be made with them.

    def op_global(self, argument: Any) -> None:
        module, _, name = argument.partition(" ")
        self.push(mentioned(module, name), CONTAINER + 2 * len(argument))

    def op_stack_global(self, _: Any) -> None:
        name, module = self.pop(), self.pop()
        self.push(mentioned(module, name), CONTAINER)

    def op_reduce(self, _: Any) -> None:
        arguments, function = self.pop(), self.pop()
        self.push(Made(called(function, arguments), arguments), CONTAINER)

    def op_newobj(self, _: Any) -> None:
        arguments, cls = self.pop(), self.pop()
        self._new(cls, arguments)

    def op_newobj_ex(self, _: Any) -> None:
        _keywords, arguments, cls = self.pop(), self.pop(), self.pop()
        self._new(cls, arguments)

    def _new(self, cls: Any, arguments: Any) -> None:
        mentioned(getattr(cls, "module", None), getattr(cls, "name", None))
        if type(arguments) is not tuple:
            raise HostilePickle("the pickle makes an object without a tuple of arguments")
        self.push(Made(cls, arguments), CONTAINER)

    def op_build(self, _: Any) -> None:
        state = self.pop()
        target = self.top()
        if not isinstance(target, Made) or target.state is not None:
            raise HostilePickle("the pickle gives a state to something that takes none")
        target.state = state

    def op_binpersid(self, _: Any) -> None:
        self.push(Persistent(self.pop()), CONTAINER)
