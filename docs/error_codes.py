"""Every code that a refusal or a reason can have, read from the source: none is listed by hand."""

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("fl_server_core", "fl_server_ai", "fl_server_api")
REASON = re.compile(r"([A-Z][A-Z_]{3,}): ")
ABOUT = {  # where the text is put together from parts
    "BAD_PREPROCESSING": "the pipeline is no list of steps, or a step has an option that it does not know; see the page on preprocessing",
    "METHOD_NOT_ALLOWED": "the address has no such method; `Allow` names those that it has",
    "THROTTLED": "more requests than are allowed in that time, or too many wrong passwords; wait as long as `Retry-After` says",
    "UNKNOWN_FIELD": "there is no field of this name; the detail names the one that was probably meant",
    "UNKNOWN_TRANSFORM": "a transform that is not read here; the page on preprocessing lists those that are",
}
# Raised where only the server's own work can come to them, never a request: they stand in the reason of a training or a
# round, or guard against callers that are not there.
NO_ANSWERS = {
    (400, "BAD_WEIGHT"), (400, "NO_DRAWS"), (400, "SAMPLE_SIZE"), (400, "NO_MOMENTS"),
    (400, "DEVIATIONS"), (400, "WRONG_KIND"), (400, "NO_DROPOUT"), (409, "GONE"), (422, "NOT_REPRESENTABLE"),
}  # fmt: skip
OWN = re.compile(r"^    (default_)?code(: ClassVar\[str\])? = \"[A-Z]", re.MULTILINE)


@dataclass
class Entry:
    """One code under one status: the texts that it comes with, and the files that they are in."""

    status: int
    code: str
    says: dict[str, None] = field(default_factory=dict)
    files: dict[str, None] = field(default_factory=dict)


def refusals() -> list[Entry]:
    """All that come as the answer to a request, by status and code."""
    return [entry for entry in _all() if (entry.status, entry.code) not in NO_ANSWERS]


def _all() -> list[Entry]:
    found: dict[tuple[int, str], Entry] = {}

    def add(status: int, code: str, says: str = "", file: str = "") -> None:
        entry = found.setdefault((status, code), Entry(status, code))
        entry.says.update(dict.fromkeys(filter(None, [says])))
        entry.files.update(dict.fromkeys(filter(None, [file])))

    kinds = _kinds()
    for path, tree in _sources():
        for kind, code, says in _raised(tree, set(kinds)):
            add(_status(kinds[kind]), code or kinds[kind].code, says, path)
        if path.endswith("fl_server_api/errors.py"):
            for status, code, says in _answered(tree):
                add(status, code, says, path)
    from fl_server_api import errors
    from fl_server_core import exceptions

    for name, kind in kinds.items():
        generic = kind.__module__ == exceptions.__name__ and kind.__subclasses__()
        if not generic and name != "AuthenticationFailed":
            add(_status(kind), kind.code, _doc(kind), "")
    for status, code in errors.CODES.items():
        add(status, code)
    for kind in _below(importlib.import_module("rest_framework.exceptions").APIException):
        if kind.__module__.startswith(PACKAGES):
            add(kind.status_code, kind.default_code, _doc(kind))
    for entry in found.values():
        if not entry.says:
            entry.says[ABOUT[entry.code]] = None
    return sorted(found.values(), key=lambda entry: (entry.status, entry.code))


def reasons() -> list[Entry]:
    """All that stand at the start of a reason: of a round, an update, a part or a training; no status."""
    gaps = importlib.import_module("fl_server_core.selectors.gaps")
    inside = [entry for entry in _all() if (entry.status, entry.code) in NO_ANSWERS]
    found = {entry.code: entry for entry in inside}
    for path, tree in _sources():
        for node in _own_texts(tree):
            text = _text(node)
            for name in ("ROUND_FULL", "LATE_COUNTS", "SUPERSEDED", "ROUND_SKIPPED"):
                text = text.replace(f"{{{name}}}", getattr(gaps, name))
            match = REASON.match(text)
            if match and text[match.end() :].strip():
                entry = found.setdefault(match.group(1), Entry(0, match.group(1)))
                entry.says[text[match.end() :]] = entry.files[path] = None
    return sorted(found.values(), key=lambda entry: entry.code)


def _own_texts(node: ast.AST) -> Iterator[ast.AST]:
    """Literal texts, but no docstrings and no parts of others."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Constant | ast.JoinedStr):
            yield child
        elif not (isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)):
            yield from _own_texts(child)


def _kinds() -> dict[str, Any]:
    """Exceptions that become a refusal, by name."""
    from rest_framework.exceptions import AuthenticationFailed

    from fl_server_core.exceptions import DomainError

    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        if OWN.search(path.read_text(encoding="utf-8")):  # classes are known once they are loaded
            importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    kinds = {kind.__name__: kind for kind in _below(DomainError)}
    return {**kinds, "AuthenticationFailed": AuthenticationFailed}


def _below(kind: type[Any]) -> Iterator[Any]:
    below: type[Any]
    for below in kind.__subclasses__():
        yield below
        yield from _below(below)


def _status(kind: type[Any]) -> int:
    from fl_server_api.errors import STATUS

    return next((status for base, status in STATUS.items() if issubclass(kind, base)), 401)


def _doc(kind: type[Any]) -> str:
    return (inspect.getdoc(kind) or "").split("\n\n")[0]


def _sources() -> Iterator[tuple[str, ast.Module]]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield str(path.relative_to(ROOT)), ast.parse(path.read_text(encoding="utf-8"))


def _raised(tree: ast.Module, names: set[str]) -> Iterator[tuple[str, str, str]]:
    """(exception, code or nothing, text) of each call of one of these."""
    for scope in [tree, *(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef))]:
        said = _Said(scope)
        for node in _own(scope):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name not in names or not node.args:
                continue
            given = {word.arg: word.value for word in node.keywords}
            if name == "AuthenticationFailed" and len(node.args) > 1:
                given["code"] = node.args[1]
            code = given.get("code")
            if code is not None and not isinstance(code, ast.Constant):
                continue  # handed on: it is raised somewhere else
            first = node.args[0]
            text = said.before(first)
            yield name, str(code.value) if code else "", text


class _Said:
    """Texts that a function gives names to."""

    def __init__(self, scope: ast.AST) -> None:
        self._lines = [
            (node.lineno, target.id, _text(node.value))
            for node in _own(scope)
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        ]

    def before(self, node: Any) -> str:
        """The text that `node` is, or that its name was given last above it."""
        if not isinstance(node, ast.Name):
            return _text(node)
        found = [
            (line, text)
            for line, name, text in self._lines
            if name == node.id and line <= node.lineno
        ]
        return max(found, default=(0, ""))[1]


def _own(scope: ast.AST) -> Iterator[ast.AST]:
    """Nodes of a module or function, without those of functions in it."""
    for node in ast.iter_child_nodes(scope):
        if not isinstance(node, ast.FunctionDef):
            yield node
            yield from _own(node)


def _answered(tree: ast.Module) -> Iterator[tuple[int, str, str]]:
    """What `errors.py` itself says: `status, {"detail": ..., "code": ...}`, and `_plain(request, status, code, ...)`."""
    for scope in (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)):
        said = _Said(scope)
        for node in _own(scope):
            words = []
            if (
                isinstance(node, ast.Tuple)
                and len(node.elts) == 3
                and isinstance(node.elts[1], ast.Dict)
            ):
                body = dict(zip(map(_text, node.elts[1].keys), node.elts[1].values, strict=True))
                words = [node.elts[0], body.get("code"), body.get("detail")]
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "_plain":
                words = node.args[1:4]
            if len(words) == 3 and all(isinstance(w, ast.Constant) for w in words[:2]):
                text = said.before(words[2])
                yield words[0].value, words[1].value, text
            elif (
                isinstance(node, ast.Assign)
                and isinstance(node.value, ast.Tuple)
                and any(
                    isinstance(target, ast.Tuple) and _name(target.elts[0]) == "code"
                    for target in node.targets
                )
            ):
                yield 403, str(getattr(node.value.elts[0], "value", "")), "no valid CSRF token"


def _name(node: ast.AST) -> str:
    return getattr(node, "id", "")


def _text(node: Any) -> str:
    """A literal text, with names of what is filled in."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        parts = (
            str(part.value) if isinstance(part, ast.Constant) else f"{{{ast.unparse(part.value)}}}"
            for part in node.values
        )
        return "".join(parts)
    if isinstance(node, ast.BinOp):
        return _text(node.left) + _text(node.right)
    return ""
