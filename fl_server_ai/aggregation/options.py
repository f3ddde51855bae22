"""Options from outside become a frozen dataclass; every refusal says where and why.

A field is an int, float, bool, str, a list of one of these, `dict[str, Any]`, or one of all these or None. Its metadata may hold
`ge`, `gt`, `le`, `lt` and `choices`, which of a list count for each item, `items` (the least and the most of
them), `pattern` (of a whole str) and `doc`. With `asked` a field has a default only for those who make the class
themselves: whoever takes options from a person insists on it (`asked_for`), and the schema requires it.
"""

import difflib
import math
import operator
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from fl_server_core.exceptions import Invalid

T = TypeVar("T")
LIMITS: dict[str, tuple[str, str, Callable[[Any, Any], bool]]] = {
    "ge": ("minimum", "at least", operator.ge),
    "gt": ("exclusiveMinimum", "more than", operator.gt),
    "le": ("maximum", "at most", operator.le),
    "lt": ("exclusiveMaximum", "less than", operator.lt),
}
JSON_TYPES = {
    int: "integer", float: "number", bool: "boolean", str: "string", list: "array", dict: "object",
}  # fmt: skip
ARTICLES = {
    int: "an integer", float: "a number", bool: "true or false", str: "a string", dict: "an object",
}  # fmt: skip
PLURALS = {int: "integers", float: "numbers", bool: "booleans", str: "strings"}
BAD = object()


def parse_options(
    cls: type[T],
    mapping: Mapping[str, Any],
    *,
    pointer: str = "/options",
    beside: Collection[str] = (),
) -> T:
    """Make a `cls` of `mapping`, or raise `Invalid` (BAD_OPTION) whose data names *every* fault in `errors`.

    An int will do for a float; a bool is not a number; NaN and infinities are none either. What is left out
    gets its default. `beside`: names that are valid in the same place, for the message about unknown ones.
    """
    errors: list[dict[str, str]] = []
    known = {field.name: (field, kind) for field, kind in _fields(cls)}

    def fault(name: str, code: str, detail: str) -> None:
        key = name.replace("~", "~0").replace("/", "~1")
        errors.append({"pointer": f"{pointer}/{key}", "code": code, "detail": detail})

    values: dict[str, Any] = {}
    for name, given in mapping.items():
        if name not in known:
            fault(str(name)[:64], "unknown", _unknown(str(name), [*known, *beside]))
            continue
        field, kind = known[name]
        value = _convert(given, kind)
        if value is BAD:
            fault(name, "type", f"must be {_spoken(kind)}")
            continue
        for code, detail in _limits(field, value):
            fault(name, code, detail)
        values[name] = value
    for name, (field, _) in known.items():
        if name not in mapping and field.default is MISSING and field.default_factory is MISSING:
            fault(name, "required", "must be given")
    if errors:
        said = "; ".join(f"{error['pointer']}: {error['detail']}" for error in errors[:5])
        raise Invalid(f"bad options: {said}"[:2000], code="BAD_OPTION", errors=errors)
    return cls(**values)


def _unknown(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else "."
    return f"unknown option {name[:64]}{hint} There are {', '.join(known) or 'no options'}"


def schema(cls: type[Any]) -> dict[str, Any]:
    """JSON schema (2020-12) of what `parse_options` takes for `cls`."""
    properties: dict[str, Any] = {}
    required = []
    for field, kind in _fields(cls):
        types = [JSON_TYPES[get_origin(part) or part] for part in _parts(kind)]
        if NoneType in get_args(kind):
            types.append("null")
        entry: dict[str, Any] = {"type": types[0] if len(types) == 1 else types}
        bounds = {
            LIMITS[name][0]: field.metadata[name] for name in LIMITS if name in field.metadata
        }
        if "array" in types:
            item = next(get_args(part)[0] for part in _parts(kind) if get_origin(part) is list)
            entry["items"] = {"type": JSON_TYPES[item], **bounds}
            if "items" in field.metadata:
                entry["minItems"], entry["maxItems"] = field.metadata["items"]
        if types[0] != "array":
            entry |= bounds
        if "choices" in field.metadata:
            entry["items" if "array" in types else "enum"] = (
                {"type": "string", "enum": list(field.metadata["choices"])}
                if "array" in types
                else list(field.metadata["choices"])
            )
        if "pattern" in field.metadata:
            entry["pattern"] = f"^({field.metadata['pattern']})$"
        if "doc" in field.metadata:
            entry["description"] = field.metadata["doc"]
        if field.metadata.get("asked"):
            required.append(field.name)
        elif field.default is not MISSING:
            entry["default"] = field.default
        elif field.default_factory is not MISSING:
            entry["default"] = field.default_factory()
        else:
            required.append(field.name)
        properties[field.name] = entry
    result = {"type": "object", "properties": properties, "additionalProperties": False}
    return result | ({"required": required} if required else {})


def asked_for(cls: type[Any]) -> list[str]:
    """The options that a person has to decide on, if only to say null."""
    return [field.name for field in fields(cls) if field.metadata.get("asked")]


def limits_text(entry: Mapping[str, Any]) -> list[str]:
    """What one property of a schema allows, in words."""
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    found = [f"{sign} {entry[key]}" for key, sign in signs.items() if key in entry]
    return found + ([" or ".join(map(str, entry["enum"]))] if "enum" in entry else [])


def _fields(cls: type[Any]) -> Iterator[tuple[Field[Any], Any]]:
    hints = get_type_hints(cls)
    for field in fields(cls):
        yield field, hints[field.name]


def _parts(kind: Any) -> list[Any]:
    """The type, or the members of a union, without None."""
    members = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    return [member for member in members if member is not NoneType]


def _spoken(kind: Any) -> str:
    words = [
        f"a list of {PLURALS[get_args(part)[0]]}"
        if get_origin(part) is list
        else ARTICLES[get_origin(part) or part]
        for part in _parts(kind)
    ]
    return " or ".join(words + ["null"] * (NoneType in get_args(kind)))


def _convert(value: Any, kind: Any) -> Any:
    if value is None and NoneType in get_args(kind):
        return None
    for part in _parts(kind):
        if part is float and type(value) in (int, float):
            return _finite(value)
        if get_origin(part) is dict and isinstance(value, dict):
            return value if all(type(name) is str for name in value) else BAD
        if get_origin(part) is list and isinstance(value, list | tuple):
            items = [_convert(item, get_args(part)[0]) for item in value]
            return BAD if any(item is BAD for item in items) else items
        if type(value) is part:
            return value
    return BAD


def _finite(value: float) -> Any:
    try:
        number = float(value)
    except OverflowError:
        return BAD
    return number if math.isfinite(number) else BAD


def _limits(field: Field[Any], value: Any) -> Iterator[tuple[str, str]]:
    if value is None:
        return
    items = value if isinstance(value, list) else [value]
    least, most = field.metadata.get("items", (0, math.inf))
    if isinstance(value, list) and not least <= len(value) <= most:
        yield "length", f"must be a list of {least}" + (f" to {most}" if most != least else "")
    for name, (_, words, holds) in LIMITS.items():
        if name in field.metadata and not all(holds(item, field.metadata[name]) for item in items):
            yield "range", f"must be {words} {field.metadata[name]}"
    pattern = field.metadata.get("pattern")
    if pattern is not None and not re.fullmatch(pattern, str(value)):
        yield "pattern", f"must look like {pattern}"
    choices = field.metadata.get("choices")
    if choices is not None and any(item not in choices for item in items):
        yield "choice", f"must be one of {', '.join(map(str, choices))}"
