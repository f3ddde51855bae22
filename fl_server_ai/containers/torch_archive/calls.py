"""Which names and calls have a place in a file of weights.

Nothing is executed either way. What is refused here is refused so that a hostile file is an error that
somebody sees, instead of weights that look harmless and are kept.
"""

import re
import sys
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING  # Python 2's names, which protocol 2 writes
from typing import Any

from fl_server_ai.containers.torch_archive.records import Global, Made
from fl_server_core.exceptions import BadContainer

IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*", re.ASCII)
MAX_NAME = 500
INSTEAD = "save model.state_dict() instead"

# Of the standard library, a module may mention these, and a program may call them.
PLAIN = frozenset(
    [
        "collections.OrderedDict",
        "collections.defaultdict",
        "collections.deque",
        "collections.Counter",
        "builtins.set",
        "builtins.frozenset",
        "builtins.list",
        "builtins.dict",
        "builtins.tuple",
        "builtins.int",
        "builtins.float",
        "builtins.bool",
        "builtins.str",
        "builtins.bytes",
        "builtins.complex",
        "builtins.slice",
        "builtins.range",
        "builtins.object",
        "builtins.type",
        "builtins.NoneType",
        "builtins.Ellipsis",
        "_codecs.encode",
        "functools.partial",
        "types.SimpleNamespace",
        "datetime.datetime",
        "datetime.date",
        "datetime.timedelta",
        "pathlib.Path",
        "pathlib.PosixPath",
        "pathlib.PurePosixPath",
        "pathlib.WindowsPath",
        "uuid.UUID",
        "argparse.Namespace",
        "logging.getLogger",
        "re._compile",
        "datetime.timezone",
        "builtins.getattr",  # of a class or an object here, by a plain name: see `called`
        "decimal.Decimal",
        "fractions.Fraction",
    ]
)
PLAIN_MODULES = frozenset({"math", "typing", "numbers", "abc", "enum"})
# Of torch and numpy, a program may call these; classes and functions may be mentioned by modules.
REBUILDERS = frozenset(
    [
        "torch.Size",
        "torch.device",
        "torch._tensor._rebuild_from_type_v2",
        "torch._tensor._rebuild_from_type",
        "torch.serialization._get_layout",
        "torch._C._distributed_c10d.ReduceOp",
        "torch.jit._pickle.build_intlist",
        "torch.jit._pickle.build_tensorlist",
        "torch.jit._pickle.build_doublelist",
        "torch.jit._pickle.build_boollist",
        "torch.jit._pickle.build_tensor_from_id",
        "torch.jit._pickle.restore_type_tag",
        "numpy.dtype",
        "numpy.ndarray",
        "numpy.core.multiarray._reconstruct",
        "numpy.core.multiarray.scalar",
        "numpy._core.multiarray._reconstruct",
        "numpy._core.multiarray.scalar",
    ]
)
REBUILD = re.compile(r"torch\._utils\._rebuild_[a-z0-9_]+")
# What torch and numpy have for loading, compiling and sending programs.
TOOLS = re.compile(
    r"torch\.(?:load|save|from_file|ops|classes|hub\b|package\b|jit\.(?!_pickle)|testing\b|_inductor\b"
    r"|_dynamo\b|serialization\.(?!_get_layout)|storage\._load|distributed\.(?!algorithms)"
    r"|utils\.(?!data\b|checkpoint\b|hooks\b|_pytree\b))|torch\._utils_internal"
    r"|numpy\.(?:load|save|f2py|testing|distutils|ctypeslib|lib)\b"
)
DUNDER = re.compile(r"(^|\.)__\w+__($|\.)")  # the way from any function to all others
LISTED = frozenset({"torch", "numpy"})  # packages whose callables are listed above
STANDARD = sys.stdlib_module_names


class HostilePickle(BadContainer):
    """The program does something that no file of weights needs."""

    code = "HOSTILE_PICKLE"


def mentioned(module: Any, name: Any) -> Global:
    """A name that may stand in a file of weights, with its module as Python 3 calls it; or `HostilePickle`."""
    for part in (module, name):
        if type(part) is not str or len(part) > MAX_NAME or not IDENTIFIER.fullmatch(part):
            raise HostilePickle("the pickle names something that can't be a Python name")
    if DUNDER.search(name) or ("." in name and STANDARD & set(name.split("."))):
        raise HostilePickle(f"the pickle names {name!r}, which has no place in weights")
    renamed = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    found = Global(*renamed)
    top = found.module.partition(".")[0]
    if TOOLS.match(found.path):
        raise HostilePickle(
            f"the pickle names {found.path}, which has no place in weights; {INSTEAD}"
        )
    if top in STANDARD and found.module not in PLAIN_MODULES and found.path not in PLAIN:
        raise HostilePickle(
            f"the pickle names {found.path}, which has no place in weights; {INSTEAD}"
        )
    return found


def called(function: Any, arguments: Any) -> Global:
    """The function of a call that may stand in a file of weights; or `HostilePickle`."""
    if not isinstance(function, Global) or type(arguments) is not tuple:
        raise HostilePickle("the pickle calls something that is no plain name")
    top = function.module.partition(".")[0]
    if function.path == "builtins.getattr" and not _attribute(arguments):
        raise HostilePickle(f"the pickle looks up an attribute in an odd way; {INSTEAD}")
    if function.path in PLAIN or function.path in REBUILDERS or REBUILD.fullmatch(function.path):
        return function
    if top == "__torch__":  # a class in a TorchScript archive's own code
        return function
    if top in STANDARD or top in LISTED or not _enum_member(function, arguments):
        raise HostilePickle(f"the pickle calls {function.path}; {INSTEAD}")
    return function


def _attribute(arguments: tuple[Any, ...]) -> bool:
    """torch.relu, bound methods and nested classes pickle as `getattr(owner, "name")`."""
    if len(arguments) != 2 or not isinstance(arguments[0], Global | Made):
        return False
    owner, name = arguments
    if isinstance(owner, Global) and owner.module.partition(".")[0] in STANDARD:
        return False
    return (
        type(name) is str
        and bool(IDENTIFIER.fullmatch(name))
        and "." not in name
        and not DUNDER.search(name)
        and name not in STANDARD
    )


def _enum_member(function: Global, arguments: tuple[Any, ...]) -> bool:
    """Modules of users hold enums, which pickle as `Class(value)`."""
    name = function.name.rpartition(".")[2]
    return name[:1].isupper() and len(arguments) == 1 and type(arguments[0]) in {int, str, float}
