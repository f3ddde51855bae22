"""Whether a TorchScript program could remember something from one call to the next where no version counter tells.

autograd counts writes to tensors, but not those through `.data` or by normalisation in training, and a program may
also change lists, numbers and tensors that are attributes without being parameters or buffers.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

WRITERS = frozenset({"prim::SetAttr", "prim::data", "aten::data"})
# What the inliner leaves: calls whose code is not in this graph.
CALLS = frozenset({"prim::CallMethod", "prim::CallFunction", "prim::fork", "prim::awaitable"})
NORMS = frozenset(
    ["aten::batch_norm", "aten::instance_norm", "aten::native_batch_norm", "aten::_batch_norm_impl_index"]
)  # fmt: skip
MAYBE = "Optional[Tensor]"
_FIXED = """BoolType ComplexType DeviceObjType FloatType IntType NoneType NumberType StringType
    TensorType"""
FIXED = frozenset(_FIXED.split())


@dataclass(frozen=True)
class Memory:
    """`hidden`: it may keep what nobody can compare. `tensors`: attributes that `state_dict` leaves out.

    `norms`: it may write running statistics, which are one-dimensional.
    """

    hidden: bool
    tensors: tuple[Tensor, ...]
    norms: bool


def memory_of(module: Any) -> Memory:
    """By the code of `forward` and all that it calls; without code there is no telling."""
    try:
        nodes = list(_nodes(module.inlined_graph))
    except (AttributeError, RuntimeError):
        return Memory(hidden=True, tensors=(), norms=True)
    kinds = {node.kind() for node in nodes}
    parts = list(module.modules())
    classes = {str(part._c._type()) for part in parts}
    got = {
        (node.s("name"), output.type().kind(), str(output.type()))
        for node in nodes
        if node.kind() == "prim::GetAttr"
        for output in node.outputs()
    }
    odd = {told for _, kind, told in got if kind not in FIXED and told not in {*classes, MAYBE}}
    written = {
        next(node.inputs()).type().kind()
        for node in nodes
        if "!" in node.schema() and len(list(node.inputs()))
    }
    holds_tensors = any("Tensor" in told or "[" not in told for told in odd)
    hidden = (
        bool(kinds & (WRITERS | CALLS))
        or bool(odd and written - {"TensorType"})
        or bool(holds_tensors and written)
    )
    names = {name for name, kind, told in got if kind == "TensorType" or told == MAYBE}
    found = (part._c.getattr(name) for part in parts for name in names if part._c.hasattr(name))
    tensors = tuple(value for value in found if isinstance(value, Tensor))
    return Memory(hidden, tensors, bool(kinds & NORMS))


def _nodes(block: Any) -> Iterator[torch._C.Node]:
    for node in block.nodes():
        yield node
        for inner in node.blocks():
            yield from _nodes(inner)
