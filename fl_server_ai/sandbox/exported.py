"""The static check of `torch.export` archives (.pt2): what torch would unpickle, evaluate or look up, found before it does.

`torch.export.load` unpickles constants that are objects, weights with `use_pickle`, everything of the older layouts,
and always the sample inputs; it evaluates `expr_str` with sympy and executes `guards_code`. Sample inputs are in
every file that `torch.export.save` writes, so that they are not refused: they and all that a prediction does not
need are left out when the child reads the file (`exported_loading.py`), and never reach torch.
"""

import json
import re
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import Any

from fl_server_ai.containers.limits import Limits
from fl_server_ai.containers.torch_archive.archive import Archive, open_archive
from fl_server_ai.containers.torch_archive.exports import (
    CONFIGS,
    MODEL,
    MODEL_BYTES,
    check_entries,
    table_views,
)
from fl_server_ai.containers.torch_archive.scripts import ForbiddenOperator
from fl_server_ai.sandbox.operators import NAMESPACES, NEXT
from fl_server_core.exceptions import BadContainer

DEEPEST = 60  # JSON within JSON

IDENTIFIER = re.compile(r"[A-Za-z_][\w.]*", re.ASCII)
OPERATOR = re.compile(r"torch\.ops\.(\w+)\.(\w+)(?:\.\w+)?", re.ASCII)
_TARGETS = """_operator.add _operator.sub _operator.mul _operator.floordiv _operator.truediv _operator.mod
    _operator.pow _operator.neg _operator.getitem _operator.eq _operator.ne _operator.lt _operator.le
    _operator.gt _operator.ge _operator.and_ _operator.or_ _operator.not_ math.ceil math.floor
    math.trunc math.sqrt torch.sym_int torch.sym_float torch.sym_max torch.sym_min torch.sym_ite
    torch.sym_not torch.sym_sqrt torch.sym_sum torch._sym_sqrt torch.ops.higher_order.cond
    torch.ops.higher_order.wrap_with_set_grad_enabled"""
OTHER_TARGETS = frozenset(_TARGETS.split())
# An expression over sizes: numbers, symbols, and functions of torch and sympy that calculate.
EXPRESSION = re.compile(r"[\w\s+\-*/(),<>=&|~%.]{1,1000}", re.ASCII)
WORDS = re.compile(r"[A-Za-z_]\w*", re.ASCII)
POINTS = re.compile(r"(?<!\d)\.(?!\d)", re.ASCII)  # a point that is in no number
QUOTED = re.compile(
    r"\b(?:Symbol\('(?=(?:zuf|zf|s|u|z|f|i)\d+')|Float\('(?=[\d.e+-]+'))([\w.+-]+)'", re.ASCII
)
SYMBOL = re.compile(r"(?:zuf|zf|s|u|z|f|i)\d+", re.ASCII)
_FUNCTIONS = """FloorDiv ModularIndexing Where PythonMod Mod CleanDiv CeilToInt FloorToInt CeilDiv LShift
    RShift PowByNatural FloatPow FloatTrueDiv IntTrueDiv TruncToFloat TruncToInt RoundToInt RoundDecimal
    ToFloat Identity IsNonOverlappingAndDenseIndicator Max Min Eq Ne Lt Le Gt Ge And Or Not Abs True
    False Piecewise Integer Rational Add Mul Pow Half Zero One NegativeOne Symbol Float integer
    positive nonnegative negative zero real finite precision evaluate Equality Unequality
    StrictLessThan LessThan StrictGreaterThan GreaterThan true false"""
FUNCTIONS = frozenset(_FUNCTIONS.split())
TREES = frozenset({"builtins.tuple", "builtins.list", "builtins.dict", None})


def check_exported(path: Path, limits: Limits) -> None:
    """Raise `PickledEntry`, `ForbiddenOperator`, or `BadContainer` for what `torch.export.save` doesn't write."""
    with open_archive(path, limits) as archive:
        check_entries(archive)
        weights, _ = (table_views(archive, name) for name in CONFIGS)
        model = _json(archive, MODEL)
    _check_signature(model, weights)
    for key, value in _members(model):
        check = CHECKS.get(key)
        if check is not None and value is not None:
            check(value)


def _json(archive: Archive, name: str) -> Any:
    raw = archive.read(name, MODEL_BYTES)
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise BadContainer(f"{name} is no JSON") from error


def _members(value: Any, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Every key with its value, at any depth."""
    if depth > DEEPEST:
        raise BadContainer("the program's JSON is nested too deeply")
    if isinstance(value, dict):
        for key, member in value.items():
            if key == "metadata":
                continue  # not given to torch
            yield key, member
            yield from _members(member, depth + 1)
    elif isinstance(value, list):
        for member in value:
            yield from _members(member, depth + 1)


def _check_signature(model: Any, weights: Container[str]) -> None:
    """What the graph takes for its state must be what the archive holds as weights, or it would not load."""
    try:
        inputs = model["graph_module"]["signature"]["input_specs"]
        for spec in inputs:
            held = spec.get("parameter") or spec.get("buffer") or {}
            name = held.get("parameter_name") or held.get("buffer_name")
            if name is not None and held.get("persistent", True) and name not in weights:
                raise BadContainer(
                    f"the graph uses {str(name)[:64]!r}, which is none of the weights"
                )
    except (KeyError, TypeError, AttributeError) as error:
        raise BadContainer("the program has no signature as torch writes it") from error


def _check_target(value: Any) -> None:
    if not isinstance(value, str):
        raise BadContainer("the program calls something that is no name")
    found = OPERATOR.fullmatch(value)
    known = found and found.group(2) in NAMESPACES.get(found.group(1), frozenset())
    if not known and value not in OTHER_TARGETS:
        raise ForbiddenOperator(
            f"{value[:80]} is no operator that a model may use here; {NEXT}", operator=value[:80]
        )


def _check_name(value: Any) -> None:
    if not isinstance(value, str) or (value and not IDENTIFIER.fullmatch(value)):
        raise BadContainer(f"{str(value)[:64]!r} can't be a name in a program")


def _check_expression(value: Any) -> None:
    # sympy's srepr quotes symbols and floats: Mul(Integer(2), Symbol('s31', integer=True)).
    plain = QUOTED.sub(r"(\1", value) if isinstance(value, str) else ""
    words = WORDS.findall(plain)
    if (
        not EXPRESSION.fullmatch(plain)
        or POINTS.search(plain)
        or not all(word in FUNCTIONS or SYMBOL.fullmatch(word) for word in words)
    ):
        raise BadContainer(f"{str(value)[:64]!r} is no plain expression over sizes")


def _check_tree(value: Any) -> None:
    """How inputs and outputs are nested; a text of JSON: torch imports the modules that it names."""
    try:
        tree = json.loads(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadContainer("the program's inputs or outputs are not described by JSON") from error
    for key, member in _members(tree):
        if key == "type" and member not in TREES:
            raise BadContainer(
                f"inputs and outputs are tuples, lists and dicts of tensors, no {str(member)[:64]}"
            )


CHECKS: dict[str, Callable[[Any], None]] = {
    "target": _check_target,
    "as_operator": _check_target,
    "name": _check_name,
    "as_name": _check_name,
    "expr_str": _check_expression,
    "in_spec": _check_tree,
    "out_spec": _check_tree,
    "treespec_str": _check_tree,
    "as_custom_obj": lambda _: _check_target("a custom object"),
}
