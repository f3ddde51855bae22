"""What a pickle program leaves behind here: plain records of what it said, which do nothing.

None of them compares or hashes by value, so that whatever a hostile program nests stays inert.
"""

from typing import Any, NamedTuple


class Global(NamedTuple):
    """A name that the program mentions. Nothing is ever looked up by it."""

    module: str
    name: str

    @property
    def path(self) -> str:
        return f"{self.module}.{self.name}"


class Persistent:
    """A persistent id: how torch refers to a storage."""

    __slots__ = ("id",)

    def __init__(self, id: Any) -> None:
        self.id = id


class Pairs:
    """A dict, or what a dict-like object was filled with, in that order."""

    __slots__ = ("pairs",)

    def __init__(self) -> None:
        self.pairs: list[tuple[Any, Any]] = []


class Items:
    """A list or a set, or what a list-like object was filled with."""

    __slots__ = ("items",)

    def __init__(self) -> None:
        self.items: list[Any] = []


class Made:
    """What the program would have made by calling `function`; `state` is what it would have been given."""

    __slots__ = ("arguments", "function", "items", "pairs", "state")

    def __init__(self, function: Global, arguments: Any) -> None:
        self.function = function
        self.arguments = arguments
        self.state: Any = None
        self.pairs: Pairs | None = None
        self.items: Items | None = None

    @property
    def changed(self) -> bool:
        """Whether the program went on to change it after the call."""
        return not (self.state is None and self.pairs is None and self.items is None)


def pairs_of(value: Any) -> list[tuple[Any, Any]] | None:
    """The entries of a dict or an OrderedDict; None for anything else."""
    if isinstance(value, Pairs):
        return value.pairs
    if isinstance(value, Made) and value.function.path == "collections.OrderedDict":
        if value.arguments or value.items:  # filled in ways that torch never uses
            return None
        return value.pairs.pairs if value.pairs else []
    return None


def items_of(value: Any) -> list[Any] | None:
    """The members of a list, tuple or set; None for anything else."""
    if isinstance(value, Items):
        return value.items
    if type(value) is tuple:
        return list(value)
    if isinstance(value, Made) and value.function.path in {"builtins.set", "torch.Size"}:
        arguments = value.arguments
        return items_of(arguments[0]) if arguments else []
    return None


def kind_of(value: Any) -> str:
    """A short description for an error message; never the value itself, which may nest without end."""
    if isinstance(value, Made):
        return value.function.path[:80]
    if isinstance(value, Global):
        return f"the name {value.path[:80]}"
    names = {Pairs: "dict", Items: "list", Persistent: "storage", type(None): "None"}
    return names.get(type(value), type(value).__name__)
