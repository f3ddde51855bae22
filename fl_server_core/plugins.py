"""Loads plug-ins, one by one: what one of them registers stays if all of it works, else a fault says why not.

Plug-ins are trusted code of the people who run the server: entry points of packages that they installed,
and `*.py` files in the folder `FL_PLUGIN_DIR`. Web and workers load them, each process once, so none may
import torch while it is loaded.
"""

import ast
import importlib.util
import logging
import stat
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger("fl.server")
LOCK = threading.RLock()  # one for all registries: a plug-in may register in several, or ask them
PREFIX = "fl_plugins_"
ENTRY = "entry point "
TORCH = "move it below `if TYPE_CHECKING:` or into the method that needs it"


@dataclass(frozen=True)
class Fault:
    """Why a plug-in was left out; `where` is `file:line`, or an entry point."""

    where: str
    said: str

    def __str__(self) -> str:
        return f"{self.where}: {self.said}"


class Unfit(Exception):
    """A plug-in can't be used; `line` of its file, if one is to blame."""

    def __init__(self, said: str, line: int = 0) -> None:
        super().__init__(said)
        self.line = line


@dataclass(frozen=True)
class _Added:
    undo: Callable[[], object]
    verify: Callable[[], None]


_folder: Path | None = None
_state = "new"  # of the folder; then reading, then read
_faults: list[Fault] = []
_open: list[list[_Added] | None] = []  # one for each plug-in that is being loaded; None: our own


def use_folder(folder: Path | None) -> None:
    """Where plug-ins are; read once, when a registry is first asked. Again: another folder, from then on."""
    global _folder, _state
    with LOCK:
        _folder, _state = folder, "new"
        _faults[:] = [fault for fault in _faults if fault.where.startswith(ENTRY)]


def is_read() -> bool:
    """Whether nothing is left to load."""
    return _state == "read"


def faults() -> list[Fault]:
    """What was left out so far, and why."""
    return list(_faults)


def loading() -> bool:
    """Whether a plug-in is being loaded, and not what comes with the server."""
    return bool(_open) and _open[-1] is not None


def added(undo: Callable[[], object], verify: Callable[[], None]) -> None:
    """Remember a registration: `undo` if its plug-in fails, `verify` once all of it is there."""
    if _open and (plugin := _open[-1]) is not None:
        plugin.append(_Added(undo, verify))


@contextmanager
def own() -> Iterator[None]:
    """What is registered inside comes with the server, whoever asked for it."""
    _open.append(None)
    try:
        yield
    finally:
        _open.pop()


@contextmanager
def plugin(where: str, path: Path | None = None) -> Iterator[None]:
    """Load a plug-in inside: a failure, also of `verify`, undoes it and becomes a fault."""
    mine: list[_Added] = []
    had_torch = "torch" in sys.modules
    _open.append(mine)
    try:
        yield
        for one in mine:
            one.verify()
        if not had_torch and "torch" in sys.modules:
            raise Unfit(  # noqa: TRY301 - treated like any other
                "something that it imports imports torch, which the web process must not load; "
                "import that where it is used, inside a method"
            )
    except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever a plug-in does, the others are loaded
        for one in reversed(mine):
            one.undo()
        fault = _fault(where, path, error)
        _faults.append(fault)
        log.error("plug-in left out: %s", fault)  # noqa: TRY400 - the line is what helps
    finally:
        _open.pop()


def _fault(where: str, path: Path | None, error: BaseException) -> Fault:
    said = str(error) if isinstance(error, Unfit) else f"{type(error).__name__}: {error}"
    if path is None:
        return Fault(where, said)
    line = getattr(error, "line", 0)
    if isinstance(error, SyntaxError) and error.filename == str(path):
        line, said = error.lineno or 0, f"SyntaxError: {error.msg}"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    if not line and frames:
        line = frames[-1].lineno or 0
    return Fault(f"{path}:{line}" if line else str(path), said)


def read_folder() -> None:
    """Load every file of the folder, by name; those that begin with `_` or `.` are none."""
    global _state
    if _state != "new":
        return
    _state = "reading"
    if _folder is not None and not _folder.is_dir():
        _faults.append(Fault("FL_PLUGIN_DIR", f"{str(_folder)!r} is no folder; make it, or unset"))
    for path in sorted(_folder.glob("*.py") if _folder is not None else ()):
        if not path.name.startswith(("_", ".")):
            with plugin(str(path), path):
                _load(path)
    _state = "read"


def _load(path: Path) -> None:
    for one in (path.parent, path):
        if one.stat().st_mode & stat.S_IWOTH:
            raise Unfit(f"everybody on this machine may write {str(one)!r}: chmod o-w it")
    if line := torch_line(path.read_bytes(), str(path)):
        raise Unfit(f"imports torch, which the web process must not load; {TORCH}", line)
    name = PREFIX + path.stem
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise Unfit("is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up their module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise


def torch_line(source: bytes, name: str) -> int:
    """The first line that imports torch when the file is loaded; 0 if none does."""
    todo: list[ast.AST] = list(ast.parse(source, name).body)
    while todo:
        node = todo.pop(0)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            todo[:0] = node.orelse
            continue
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        if isinstance(node, ast.stmt) and any(name.split(".")[0] == "torch" for name in names):
            return node.lineno
        todo[:0] = ast.iter_child_nodes(node)
    return 0
