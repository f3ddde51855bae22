"""Dropout on, everything else in evaluation: Gal and Ghahramani 2015, https://arxiv.org/abs/1506.02142."""

from contextlib import suppress

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.nn.modules.dropout import _DropoutNd

from fl_server_core.exceptions import Invalid

LAYERS = frozenset(
    ["Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout", "FeatureAlphaDropout"]
)
OPERATORS = frozenset(
    [
        torch.ops.aten.dropout.default,
        torch.ops.aten.feature_dropout.default,
        torch.ops.aten.alpha_dropout.default,
        torch.ops.aten.feature_alpha_dropout.default,
    ]
)


def switch_dropout(module: nn.Module) -> int:
    """Put the module in evaluation mode, its dropout layers in training mode; returns how many.

    Changes the module in place; a second call changes nothing. Dropout layers are those of `torch.nn` and their
    subclasses, those of TorchScript by original name, and dropout operators in the graph of an exported program
    (whose other layers stay as they were exported). Layers with p = 0 do not count, nor traced ones, where the
    mode is part of the trace. Dropout inside attention or recurrent layers stays off.

    Raises `Invalid` NO_DROPOUT when there is none: all draws would be alike.
    """
    with suppress(NotImplementedError):  # of an exported program: it has no modes
        module.eval()
    count = _switch_graphs(module)
    for layer in module.modules():
        if _is_dropout(layer) and getattr(layer, "p", 1.0) > 0:
            layer.train()
            count += 1
    if not count:
        raise Invalid(
            "the model has no dropout layer that could be switched on, so every draw would be the same: "
            "upload it scripted (not traced) with torch.nn.Dropout layers of p > 0, or choose another "
            "uncertainty method",
            code="NO_DROPOUT",
        )
    return count


def _is_dropout(layer: nn.Module) -> bool:
    if isinstance(layer, torch.jit.ScriptModule):
        # A traced layer has the name too, but its graph does not ask for the mode.
        return layer.original_name in LAYERS and 'name="training"' in str(layer.graph)
    return isinstance(layer, _DropoutNd)


def _switch_graphs(module: nn.Module) -> int:
    count = 0
    for layer in module.modules():
        if not isinstance(layer, GraphModule):
            continue
        found = [node for node in layer.graph.nodes if node.target in OPERATORS]
        for node in found:
            count += _switch_node(node)
        if found:
            layer.recompile()
    return count


def _switch_node(node: Node) -> int:
    tensor, p, *_ = node.args  # aten: dropout(input, p, train)
    if not isinstance(p, float) or p <= 0:
        return 0
    node.args = (tensor, p, True)
    return 1
