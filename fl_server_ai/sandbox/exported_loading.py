"""A `torch.export` archive in the child: rebuilt from the entries that are plain, then loaded and switched by its graph.

The rebuilt archive has torch's own empty sample inputs in place of the pickled ones, and neither metadata nor
`guards_code`, which torch would execute. `exported.py` has checked the rest.
"""

import encodings.cp437  # noqa: F401 - zipfile asks for it when no file can be opened any more
import io
import json
import zipfile
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import torch
import torch._export.serde.serialize
import torch.export.passes
import torch.export.pt2_archive._package
from torch import Tensor

from fl_server_ai.containers.torch_archive.exports import CONFIGS, MODEL, NUMBERS, PLAIN
from fl_server_ai.sandbox.loading import Versions
from fl_server_ai.sandbox.pipes import Refusal
from fl_server_ai.sandbox.remembering import Memory

_DROPOUT = """aten::dropout aten::dropout_ aten::alpha_dropout aten::alpha_dropout_ aten::feature_dropout
    aten::feature_dropout_ aten::feature_alpha_dropout aten::feature_alpha_dropout_
    aten::native_dropout"""
DROPOUT = frozenset(_DROPOUT.split())
BATCH_NORM = frozenset({"aten::batch_norm"})
OTHER_NORMS = frozenset({"aten::_native_batch_norm_legit_no_training", "aten::native_batch_norm"})
SAMPLE_INPUTS = "data/sample_inputs/model.pt"


class ExportedModel(Versions):
    """A graph whose dropout and BatchNorm operators have their mode as an argument."""

    def __init__(self, module: torch.fx.GraphModule, classes: dict[str, str]) -> None:
        self.module = module
        self.classes = classes
        values = (node.meta.get("val") for node in module.graph.nodes if node.op == "placeholder")
        self.shapes = [_fixed(value) for value in values]
        self._switch(DROPOUT, {"train": False, "training": False})
        self._switch(BATCH_NORM, {"training": False})
        state: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
        state |= dict(module.named_buffers(remove_duplicate=False))
        super().__init__(state, Memory(hidden=False, tensors=(), norms=True))

    def run(self, inputs: tuple[Tensor, ...]) -> Any:
        for wanted, given in zip(self.shapes, inputs, strict=False):
            if wanted is not None and not _fits(wanted, given.shape):
                sizes = ", ".join("any" if size is None else str(size) for size in wanted)
                batch = wanted and given.shape and wanted[0] not in {None, given.shape[0]}
                hint = (
                    "; to leave the first dimension free, export it with an example of two rows and "
                    "dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)"
                )
                raise Refusal(
                    "INPUT_SHAPE",
                    f"the program was exported for inputs of shape [{sizes}], not {list(given.shape)}"
                    + (hint if batch else ""),
                )
        return self.module(*inputs)

    def dropout(self, *, on: bool) -> int:
        return self._switch(DROPOUT, {"train": on, "training": on})

    def layers(self) -> list[tuple[str, str]]:
        return list(self.classes.items())

    def parameters(self) -> list[tuple[str, Tensor]]:
        return list(self.module.named_parameters(remove_duplicate=False))

    def norms(self, *, on: bool) -> list[tuple[Tensor, Tensor]] | None:
        if list(self._nodes(OTHER_NORMS)):
            return None
        self._switch(BATCH_NORM, {"training": on, "momentum": 1.0})
        tensors = self.state()
        found = []
        for _, node in self._nodes(BATCH_NORM):
            mean, variance = node.args[3:5]
            if mean is not None:
                found.append((tensors[mean.target], tensors[variance.target]))
        return found

    def read(self) -> list[float]:
        return [1.0 for _, node in self._nodes(BATCH_NORM) if node.args[3] is not None]

    def _nodes(self, names: frozenset[str]) -> Iterator[tuple[Any, Any]]:
        for part in self.module.modules():
            if isinstance(part, torch.fx.GraphModule):
                for node in part.graph.nodes:
                    if (
                        isinstance(node.target, torch._ops.OpOverload)
                        and node.target._schema.name in names
                    ):
                        yield part, node

    def _switch(self, names: frozenset[str], values: dict[str, Any]) -> int:
        """Set arguments of the operators with these names; how many there are."""
        count = 0
        for part, node in self._nodes(names):
            count += 1
            arguments, keywords = list(node.args), dict(node.kwargs)
            for index, argument in enumerate(node.target._schema.arguments):
                if argument.name in values:
                    if index < len(arguments):
                        arguments[index] = values[argument.name]
                    else:
                        keywords[argument.name] = values[argument.name]
            if (tuple(arguments), keywords) != (node.args, node.kwargs):
                node.args, node.kwargs = tuple(arguments), keywords
                part.recompile()
        return count


def _fixed(value: Any) -> list[int | None] | None:
    """A placeholder's sizes, None where any will do; None for what is no tensor."""
    shape: Iterable[Any] = value.shape if isinstance(value, Tensor) else ()
    sizes = [size if isinstance(size, int) else None for size in shape]
    return sizes if isinstance(value, Tensor) else None


def _fits(wanted: list[int | None], given: torch.Size) -> bool:
    pairs = zip(wanted, given, strict=False)
    return len(wanted) == len(given) and all(size in {None, found} for size, found in pairs)


def load_exported(file: BinaryIO, device: str) -> ExportedModel:
    """The program that the archive holds, without anything in it that is pickled or executed."""
    rebuilt, classes = _rebuilt(file)
    program = torch.export.load(rebuilt)
    if device != "cpu":
        program = torch.export.passes.move_to_device_pass(program, device)
    module: Any = program.module(check_guards=False)
    return ExportedModel(module, classes)


def _rebuilt(file: BinaryIO) -> tuple[io.BytesIO, dict[str, str]]:
    """The archive without what is pickled or executed, and the classes of the modules that it was made of."""
    classes: dict[str, str] = {}
    rebuilt = io.BytesIO()
    nothing = io.BytesIO()
    torch.save(((), {}), nothing)
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(rebuilt, "w") as new:
        for name in old.namelist():
            folder, _, entry = name.partition("/")
            if entry == MODEL:
                model = json.loads(old.read(name))
                classes = _classes(model["graph_module"])
                new.writestr(name, json.dumps(_plain(model)))
            elif entry in CONFIGS:
                new.writestr(name, json.dumps(_plain(json.loads(old.read(name)))))
            elif entry in PLAIN or NUMBERS.fullmatch(entry):
                new.writestr(name, old.read(name))
        new.writestr(f"{folder}/{SAMPLE_INPUTS}", nothing.getvalue())
    rebuilt.seek(0)
    return rebuilt, classes


def _classes(graph: Any) -> dict[str, str]:
    """Each module's class by its dotted path: what the nodes say where they come from, "key,path,class;..."."""
    found = {str(call.get("fqn")): "" for call in graph["module_call_graph"]}
    for node in graph["graph"]["nodes"]:
        stack = node.get("metadata", {}).get("nn_module_stack", "")
        for part in stack.split(";") if isinstance(stack, str) else ():
            _, _, place = part.partition(",")
            path, _, name = place.rpartition(",")
            if name:
                found[path.partition("@")[0]] = name.rpartition(".")[2]
    return found


def _plain(value: Any) -> Any:
    """Without metadata and guards, and on the CPU: the worker's own device comes after."""
    if isinstance(value, dict):
        if value.keys() == {"type", "index"} and value["type"] == "cuda":
            return {"type": "cpu", "index": None}
        emptied: dict[str, Any] = {"metadata": {}, "guards_code": []}
        return {key: emptied[key] if key in emptied else _plain(v) for key, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list) else value
