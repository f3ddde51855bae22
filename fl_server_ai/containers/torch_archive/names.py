"""Names for tensors: what `state_dict()` of the saved object would say, found without building it."""

import re
from collections.abc import Callable, Iterator
from typing import Any

from fl_server_ai.containers.header import check_name
from fl_server_ai.containers.torch_archive.archive import Archive
from fl_server_ai.containers.torch_archive.records import (
    Made,
    Pairs,
    items_of,
    kind_of,
    pairs_of,
)
from fl_server_ai.containers.torch_archive.tensors import (
    UnsupportedTensor,
    View,
    is_tensor,
    view_of,
)
from fl_server_core.exceptions import BadContainer

DEEPEST = 64  # modules within modules
MOST_MODULES = 50_000  # a shared one counts each time
LONGEST = 1_000  # characters of a module's dotted name
# Beside the weights, this one notes a version.
HARMLESS_HOOKS = frozenset({"torch.nn.utils.spectral_norm.SpectralNormStateDictHook"})
QUANTIZED = re.compile(r"torch\.(ao\.)?nn\.(intrinsic\.)?quantized\.(?!.*reference)")
EXTRA_STATE = "_extra_state"  # no weights; it stays where it is

Found = tuple[str, Any]  # a tensor's name and record
# What a module holds: its own tensors, and its children by name.
Members = tuple[list[Found], list[Found]]


class NotAStateDict(BadContainer):
    """The file holds something else than named tensors."""

    code = "NOT_A_STATE_DICT"


def entries(value: Any, what: str) -> list[tuple[str, Any]]:
    """A dict's entries with texts as keys, none of them twice."""
    pairs = pairs_of(value)
    if pairs is None:
        raise NotAStateDict(f"{what} is no dict, but {kind_of(value)}")
    seen: set[str] = set()
    for key, _ in pairs:
        if type(key) is not str:
            raise NotAStateDict(f"{what} has a key that is no text, but {kind_of(key)}")
        if key in seen:
            raise BadContainer(f"{what} has the key {key[:64]!r} twice")
        seen.add(key)
    return pairs


def named_views(
    found: Iterator[Found], archive: Archive, names: Callable[[str], str] = str
) -> dict[str, View]:
    """The tensors by name, in the program's order, each checked."""
    views: dict[str, View] = {}
    for name, value in found:
        check_name(name, archive.limits)
        if len(views) == archive.limits.tensors:
            raise BadContainer(
                f"more than {archive.limits.tensors:,} tensors are not allowed",
                code="TOO_MANY_TENSORS",
            )
        if name in views:
            raise BadContainer(f"the tensor name {name!r} occurs twice")
        views[name] = view_of(value, name, archive)
    return views


def of_saved(value: Any) -> Iterator[Found]:
    """Of what `torch.save` was given: a state dict, tensors in a list or alone, or a whole module."""
    if is_tensor(value):
        yield "0", value
        return
    if isinstance(value, Made) and not is_tensor(value) and pairs_of(value) is None:
        yield from of_module(value, pickled_module)
        return
    if pairs_of(value) is not None:
        members = entries(value, "the saved dict")
    else:
        members = [(str(index), member) for index, member in enumerate(items_of(value) or [])]
        if not members:
            raise NotAStateDict(f"the file holds {kind_of(value)}; save model.state_dict() instead")
    for name, member in members:
        if is_tensor(member):
            yield name, member
        elif not name.endswith(EXTRA_STATE):
            raise NotAStateDict(_not_a_tensor(name, member, members))


def _not_a_tensor(name: str, member: Any, members: list[Found]) -> str:
    if {"state", "param_groups"} == {key for key, _ in members}:
        return "this is the state of an optimizer; save model.state_dict() instead"
    for key, value in members:
        inner = pairs_of(value) or []
        if any(is_tensor(part) for _, part in inner):
            return f"the tensors lie under {key[:64]!r}: save that dict alone, without the others"
    return f"{name[:64]!r} holds {kind_of(member)}; a state dict holds tensors only"


def of_module(root: Any, members: Callable[[Made], Members]) -> Iterator[Found]:
    """Of a module and those within it, depth first, under dotted names."""
    stack: list[tuple[str, Any, int]] = [("", root, 0)]
    known: dict[
        Made, Members
    ] = {}  # by identity: a module that occurs often is looked through once
    left = MOST_MODULES
    while stack:
        prefix, module, depth = stack.pop()
        if not isinstance(module, Made):
            raise NotAStateDict(f"module {prefix[:64]!r} is {kind_of(module)}")
        if module.pairs or module.items:
            raise NotAStateDict(f"module {prefix[:64]!r} was filled as no module is")
        if module not in known:
            known[module] = members(module)
        tensors, children = known[module]
        yield from ((prefix + name, value) for name, value in tensors)
        left -= len(children)
        if depth > DEEPEST or left < 0 or len(prefix) > LONGEST:
            raise BadContainer("modules are nested too deeply, or without end")
        for name, child in reversed(children):
            stack.append((f"{prefix}{name[:LONGEST]}.", child, depth + 1))


def _check_plain(module: Made, held: dict[str, Any]) -> None:
    """Refuse modules whose `state_dict()` says something else than what they hold."""
    path = module.function.path
    hooks = pairs_of(held.get("_state_dict_hooks", Pairs())) or []
    renamed = any(
        not (isinstance(hook, Made) and hook.function.path in HARMLESS_HOOKS) for _, hook in hooks
    )
    if renamed or "_packed_params" in held or QUANTIZED.match(path):
        raise UnsupportedTensor(
            f"{path[:80]} packs or renames its weights; save model.state_dict() instead"
        )


def pickled_module(module: Made) -> Members:
    """Of a `torch.nn.Module` as Python pickles it: its `__dict__`."""
    state = module.state
    if type(state) is tuple and len(state) == 2:  # a class with __slots__
        state = state[0]
    if not isinstance(state, Pairs):
        raise NotAStateDict(
            f"{kind_of(module)} is no torch.nn.Module; save model.state_dict() instead"
        )
    held = dict(entries(state, kind_of(module)))
    if "_parameters" not in held or "_modules" not in held:
        raise NotAStateDict(
            f"{kind_of(module)} is no torch.nn.Module; save model.state_dict() instead"
        )
    _check_plain(module, held)
    passing = {
        name
        for name in items_of(held.get("_non_persistent_buffers_set")) or []
        if type(name) is str
    }
    tensors = [
        (name, value)
        for kind in ("_parameters", "_buffers")
        for name, value in entries(held.get(kind, Pairs()), kind)
        if value is not None and not (kind == "_buffers" and name in passing)
    ]
    for name, value in tensors:
        if not is_tensor(value):
            raise NotAStateDict(f"{name[:64]!r} of {kind_of(module)} is {kind_of(value)}")
    children = [
        (name, child) for name, child in entries(held["_modules"], "_modules") if child is not None
    ]
    return tensors, children
