"""Programs that call or name what no file of weights needs, and storages that are no storages."""

import functools
from collections.abc import Callable

from tests.ai.hostile.building import (
    BAD,
    BUILD,
    DICT,
    EMPTY,
    FALSE,
    HOSTILE,
    MARK,
    MARKER,
    MEMOIZE,
    NEWOBJ,
    NEWOBJ_EX,
    NONE,
    ORDERED,
    PERSID,
    POP,
    REDUCE,
    SETITEM,
    STACK_GLOBAL,
    TOUCH,
    TUPLE,
    UNSUPPORTED,
    blob,
    call,
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
    several,
    stacked,
    state_dict,
    storage,
    tensor,
    text,
)  # fmt: skip

MARK_PATH = text(str(MARKER))
CODE = text(f"__import__('os').system('{TOUCH}')")
SYSTEM = path("os", "system")
RUN = call(SYSTEM, text(TOUCH))
OS = call(path("builtins", "__import__"), text("os"))
GETATTR = path("builtins", "getattr")
INNER = program(RUN)
# An attribute of a package's module: in protocol 4, dots in a name reach into whatever it imports.
BACK_DOOR = stacked("numpy.lib._utils_impl", "os.system")
PARTIAL = path("functools", "partial")


# What is called, as the whole file. Those that are armed run without torch.

CALLS: dict[str, bytes] = {
    "os.system": RUN,
    "posix.system": call(path("posix", "system"), text(TOUCH)),
    "os.popen": call(path("os", "popen"), text(TOUCH)),
    "subprocess.Popen": call(path("subprocess", "Popen"), listed(text("touch"), MARK_PATH)),
    "subprocess.check_call": call(path("subprocess", "check_call"), listed(text("touch"), MARK_PATH)),
    "eval": call(path("builtins", "eval"), CODE),
    "eval by its Python 2 name": call(path("__builtin__", "eval"), CODE),
    "exec": call(path("builtins", "exec"), CODE),
    "compile, then eval": call(
        path("builtins", "eval"), call(path("builtins", "compile"), CODE, text("f"), text("eval"))
    ),
    "open": call(path("builtins", "open"), MARK_PATH, text("w")),
    "io.FileIO": call(path("_io", "FileIO"), MARK_PATH, text("w")),
    "pathlib.Path.touch": call(
        stacked("pathlib", "Path.touch"), call(path("pathlib", "Path"), MARK_PATH)
    ),
    "a chain of getattr": call(call(GETATTR, OS, text("system")), text(TOUCH)),
    "importlib.import_module": call(
        call(GETATTR, call(path("importlib", "import_module"), text("os")), text("system")), text(TOUCH)
    ),
    "operator.attrgetter": call(
        call(call(path("operator", "attrgetter"), text("system")), OS), text(TOUCH)
    ),
    "operator.methodcaller": call(
        call(path("operator", "methodcaller"), text("system"), text(TOUCH)), OS
    ),
    "functools.partial": call(call(PARTIAL, SYSTEM, text(TOUCH))),
    "functools.partial of a back door": call(call(PARTIAL, BACK_DOOR, text(TOUCH))),
    "functools.reduce": call(
        path("functools", "reduce"), GETATTR, listed(OS, text("system"), text("__call__"))
    ),
    "map into list": call(
        path("builtins", "list"), call(path("builtins", "map"), SYSTEM, listed(text(TOUCH)))
    ),
    "pickle.loads": call(path("pickle", "loads"), blob(INNER)),
    "_pickle.loads": call(path("_pickle", "loads"), blob(INNER)),
    "marshal.loads": call(path("marshal", "loads"), blob(b"N")),
    "runpy.run_path": call(path("runpy", "run_path"), MARK_PATH),
    "webbrowser.open": call(path("webbrowser", "open"), text("http://127.0.0.1:9")),
    "socket.create_connection": call(
        path("socket", "create_connection"), several(text("127.0.0.1"), number(9))
    ),
    "shutil.rmtree": call(path("shutil", "rmtree"), MARK_PATH),
    "pty.spawn": call(path("pty", "spawn"), text("true")),
    "timeit.timeit": call(path("timeit", "timeit"), CODE, text("pass"), path("time", "time"), number(1)),
    "cProfile.run": call(path("cProfile", "run"), CODE),
    "bdb.Bdb.run": call(
        stacked("bdb", "Bdb.run"), call(path("bdb", "Bdb")), CODE
    ),
    "code.interact": call(path("code", "interact")),
    "ctypes.CDLL": call(path("ctypes", "CDLL"), text("libc.so.6")),
    "sqlite3.connect": call(path("sqlite3", "connect"), MARK_PATH),
    "logging.FileHandler": call(path("logging", "FileHandler"), MARK_PATH),
    "urllib.request.urlopen": call(path("urllib.request", "urlopen"), text("http://127.0.0.1:9")),
    "types.FunctionType": call(path("types", "FunctionType"), NONE, DICT),
    "copyreg.add_extension": call(
        path("copyreg", "add_extension"), text("os"), text("system"), number(1)
    ),
    "atexit.register": call(path("atexit", "register"), SYSTEM, text("true")),
    "pip's main": call(path("pip._internal", "main"), listed(text("install"), text("x"))),
    "torch.hub.load": call(path("torch.hub", "load"), text("someone/something"), text("net")),
    "torch.load": call(path("torch", "load"), MARK_PATH),
    "torch.jit.load": call(path("torch.jit", "load"), MARK_PATH),
    "torch.storage._load_from_bytes": call(path("torch.storage", "_load_from_bytes"), blob(INNER)),
    "torch.ops.load_library": call(stacked("torch", "ops.load_library"), MARK_PATH),
    "torch.hub's os.system": call(stacked("torch.hub", "os.system"), text(TOUCH)),
    "numpy.load": call(path("numpy", "load"), MARK_PATH),
    "numpy.memmap": call(
        path("numpy", "memmap"), MARK_PATH, text("u1"), text("w+"), number(0), several(number(4))
    ),
    "numpy's os.system": call(BACK_DOOR, text(TOUCH)),
}  # fmt: skip
UNARMED = {
    "functools.reduce", "marshal.loads", "runpy.run_path", "webbrowser.open", "socket.create_connection",
    "shutil.rmtree", "pty.spawn", "code.interact", "ctypes.CDLL", "urllib.request.urlopen",
    "types.FunctionType", "copyreg.add_extension", "atexit.register", "pip's main", "torch.hub.load",
    "torch.load", "torch.jit.load", "torch.storage._load_from_bytes", "torch.ops.load_library",
    "torch.hub's os.system", "numpy.load",
}  # fmt: skip
for _name, _value in CALLS.items():
    _protocol = 2 if "Python 2" in _name else 4  # names have dots in 4, and are translated in 2
    hostile(f"calls {_name}", HOSTILE, armed=_name not in UNARMED)(
        functools.partial(saved, _value, protocol=_protocol)
    )


# Where it is called. Each place is one that a reader might look past.

PLACES: dict[str, Callable[[], bytes]] = {
    "as a value": lambda: state_dict(extra=RUN),
    "under a name that is no weight": lambda: state_dict(_extra_state=RUN),
    "as a key": lambda: pairs((text("w"), tensor()), (RUN, tensor())),
    "in a list": lambda: listed(tensor(), RUN),
    "and dropped": lambda: RUN + POP + state_dict(),
    "only in the memo": lambda: put(RUN, 7) + POP + state_dict(),
    "in an attribute of a module": lambda: module({"helper": RUN}),
    "as a module in a module": lambda: module({"_modules": named({"0": RUN})}),
    "as the state of a module": lambda: path("hospital.models", "Net") + EMPTY + NEWOBJ + RUN + BUILD,
    "as an argument of a module": lambda: (
        path("hospital.models", "Net") + several(RUN) + NEWOBJ + DICT + BUILD
    ),
    "as the argument of an OrderedDict": lambda: call(ORDERED, RUN),
    "in an OrderedDict's state": lambda: call(ORDERED) + named({"_metadata": RUN}) + BUILD,
    "as an OrderedDict's state": lambda: call(ORDERED) + RUN + BUILD,
    "in a tensor's size": lambda: state_dict(x=tensor(size=several(RUN))),
    "as a tensor's size": lambda: state_dict(x=tensor(size=RUN)),
    "as a tensor's stride": lambda: state_dict(x=tensor(stride=RUN)),
    "as a tensor's offset": lambda: state_dict(x=tensor(offset=RUN)),
    "as requires_grad": lambda: state_dict(x=tensor(grad=RUN)),
    "as a tensor's hooks": lambda: state_dict(x=tensor(hooks=RUN)),
    "in a tensor's hooks": lambda: state_dict(
        x=tensor(hooks=call(ORDERED) + number(1) + RUN + SETITEM)
    ),
    "as a tensor's storage": lambda: state_dict(x=tensor(store=RUN)),
    "as a storage's class": lambda: state_dict(x=tensor(store=storage(cls=RUN))),
    "as a storage's key": lambda: state_dict(x=tensor(store=storage(key=RUN))),
    "as a storage's place": lambda: state_dict(x=tensor(store=storage(location=RUN))),
    "as a storage's length": lambda: state_dict(x=tensor(store=storage(count=RUN))),
    "as a persistent id": lambda: state_dict(x=tensor(store=RUN + PERSID)),
    "in a parameter's state": lambda: state_dict(
        x=call(path("torch._utils", "_rebuild_parameter_with_state"), tensor(), FALSE, call(ORDERED), RUN)
    ),
    "by the rebuilding of a type": lambda: state_dict(
        x=call(
            path("torch._tensor", "_rebuild_from_type_v2"), SYSTEM, path("torch", "Tensor"),
            several(text(TOUCH)), DICT,
        )
    ),
}  # fmt: skip
for _name, _make in PLACES.items():
    hostile(f"os.system {_name}", HOSTILE, armed="rebuilding" not in _name)(
        functools.partial(lambda make: saved(make()), _make)
    )


# How it is spelled.

LINE = TOUCH.encode() + b"\n"
SPELLED: dict[str, tuple[bytes, bool]] = {
    "by INST": (MARK + b"S'" + TOUCH.encode() + b"'\n" + b"ios\nsystem\n", True),
    "by OBJ": (MARK + SYSTEM + text(TOUCH) + b"o", True),
    "by STACK_GLOBAL with memoised names": (
        text("os") + MEMOIZE + POP + text("system") + MEMOIZE + POP
        + call(b"h\x00h\x01" + STACK_GLOBAL, text(TOUCH)), True,
    ),
    "by names that are recalled": (
        put(SYSTEM, 3) + POP + call(get(3), text(TOUCH)), True,
    ),
    "by text opcodes": (SYSTEM + MARK + b"V" + LINE + TUPLE + REDUCE, True),
    "by NEWOBJ": (SYSTEM + several(text(TOUCH)) + NEWOBJ, False),
    "by NEWOBJ of Popen": (
        path("subprocess", "Popen") + several(text("true")) + NEWOBJ, False,
    ),
    "by NEWOBJ_EX": (
        path("subprocess", "Popen") + EMPTY + named({"args": text("true")}) + NEWOBJ_EX, False,
    ),
    "by EXT1": (b"\x82\x01" + several(text(TOUCH)) + REDUCE, False),
    "by EXT2": (b"\x83\x01\x00" + several(text(TOUCH)) + REDUCE, False),
    "by EXT4": (b"\x84\x01\x00\x00\x00" + several(text(TOUCH)) + REDUCE, False),
    "with a list of arguments": (SYSTEM + listed(text(TOUCH)) + REDUCE, False),
    "of a module whose name has a line's end": (
        call(text("os\nsystem") + text("system") + STACK_GLOBAL, text(TOUCH)), False,
    ),
    "of a module whose name has a NUL": (call(stacked("os\0", "system"), text(TOUCH)), False),
    "of a module whose name has a space": (call(path("os ", "system"), text(TOUCH)), False),
    "in full-width letters": (call(stacked("\uff4f\uff53", "system"), text(TOUCH)), False),
    "with a Cyrillic letter": (call(stacked("\u043es", "system"), text(TOUCH)), False),
    "of a relative module": (call(stacked(".os", "system"), text(TOUCH)), False),
    "of an empty module": (call(stacked("", "system"), text(TOUCH)), False),
    "of a module named by bytes": (call(blob(b"os") + text("system") + STACK_GLOBAL, text(TOUCH)), False),
    "of a name of a megabyte": (call(stacked("os", "system" * 170_000), text(TOUCH)), False),
    "by the result of a call": (call(call(path("builtins", "str"), text("x"))), False),
    "by a text": (text("os.system") + several(text(TOUCH)) + REDUCE, False),
    "by a tensor": (call(tensor(), text(TOUCH)), False),
    "by a storage": (call(storage(), text(TOUCH)), False),
}  # fmt: skip
for _name, (_value, _armed) in SPELLED.items():
    hostile(f"a call {_name}", HOSTILE, armed=_armed)(functools.partial(saved, _value, protocol=4))


# Persistent ids.

IDS: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "with a path upwards": (storage(text("../../etc/passwd")), (BAD,)),
    "with an absolute path": (storage(text("/etc/passwd")), (BAD,)),
    "with a NUL": (storage(text("0\0")), (BAD,)),
    "with the program as its numbers": (storage(text("../data.pkl")), (BAD,)),
    "of a storage that is not there": (storage(text("1")), (BAD,)),
    "with a number as its key": (storage(number(0)), (BAD,)),
    "with bytes as its key": (storage(blob(b"0")), (BAD,)),
    "with a place that is no text": (storage(location=number(0)), (BAD,)),
    "with True as its length": (storage(count=b"\x88"), (BAD,)),
    "with a class as its length": (storage(count=path("hospital.models", "Four")), (BAD,)),
    "with minus four numbers": (storage(count=number(-4)), (BAD,)),
    "with 2^62 numbers": (storage(count=number(2**62)), (BAD, HOSTILE)),
    "with 2^900 numbers": (storage(count=number(2**900)), (BAD, HOSTILE)),
    "with too few parts": (several(text("storage"), path("torch", "FloatStorage")) + PERSID, (BAD,)),
    "with too many parts": (
        several(
            text("storage"), path("torch", "FloatStorage"), text("0"), text("cpu"), number(4), NONE, NONE
        ) + PERSID, (BAD,),
    ),
    "of nothing": (EMPTY + PERSID, (BAD,)),
    "that is a text": (text("0") + PERSID, (BAD,)),
    "that is a list": (
        listed(text("storage"), path("torch", "FloatStorage"), text("0"), text("cpu"), number(4)) + PERSID,
        (BAD,),
    ),
    "of a persistent id": (storage() + PERSID, (BAD,)),
    "of an unknown kind": (storage(kind=text("module")), (BAD,)),
    "in text": (b"Pstorage\n", (HOSTILE,)),
    "of an unknown class": (storage(cls=path("hospital.models", "FloatStorage")), (UNSUPPORTED,)),
    "of quantized numbers": (storage(cls=path("torch", "QInt8Storage")), (UNSUPPORTED,)),
    "of complex128": (storage(cls=path("torch", "ComplexDoubleStorage")), (UNSUPPORTED,)),
    "of a class that is a text": (storage(cls=text("FloatStorage")), (UNSUPPORTED, BAD)),
}  # fmt: skip
for _name, (_value, _codes) in IDS.items():
    hostile(f"a storage {_name}", *_codes)(
        functools.partial(lambda value: saved(state_dict(x=tensor(store=value))), _value)
    )
