"""A program in the child, as a model: called, its layers switched, its state named. Locked up before it is loaded."""

import re
from collections.abc import Iterator
from typing import Any, BinaryIO, Protocol

import torch
from torch import Tensor

from fl_server_ai.sandbox.remembering import Memory, memory_of

DROPOUT = frozenset(
    ["Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout", "FeatureAlphaDropout"]
)
BATCH_NORM = frozenset({"BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm"})
SWITCHED = re.compile(r"\bself\.training\b")


class Model(Protocol):
    """What `drawing.py` needs of a program, whichever kind it is."""

    def run(self, inputs: tuple[Tensor, ...]) -> Any: ...

    def dropout(self, *, on: bool) -> int:
        """Switch dropout layers, and tell how many there are that can be."""

    def norms(self, *, on: bool) -> list[tuple[Tensor, Tensor]] | None:
        """Let BatchNorm layers write each batch's own statistics into their running ones, or stop that.

        Their running means and variances; None if there are layers that a trace has fixed.
        """

    def read(self) -> list[float]:
        """Of each BatchNorm layer: the share of a batch's statistics that it writes."""

    def layers(self) -> list[tuple[str, str]]:
        """Dotted path and class of each layer, as far as they are known; the model itself is ""."""

    def parameters(self) -> list[tuple[str, Tensor]]:
        """By name; those that are tied occur under each of theirs."""

    def state(self) -> dict[str, Tensor]: ...

    def changed(self) -> bool:
        """Whether a run may have left something behind since the program was last loaded or restored."""

    def restored(self) -> None:
        """State is again as it was loaded."""


class Versions:
    """Notices writing to tensors: by the counters that autograd keeps, and where `memory` says so in other ways."""

    def __init__(self, tensors: dict[str, Tensor], memory: Memory) -> None:
        self.tensors = tensors
        self._hidden = memory.hidden
        # Kernels write running statistics without counting.
        both = [*tensors.values(), *memory.tensors]
        self._compared = [t for t in both if memory.norms and t.dim() == 1]
        self._copies = [tensor.detach().clone() for tensor in self._compared]
        self._others = [(tensor, tensor._version) for tensor in memory.tensors]
        self.restored()

    def state(self) -> dict[str, Tensor]:
        return self.tensors

    def changed(self) -> bool:
        return (
            self._hidden
            or self._versions != [tensor._version for tensor in self.tensors.values()]
            or any(tensor._version != version for tensor, version in self._others)
            or not all(map(torch.equal, self._compared, self._copies))
        )

    def restored(self) -> None:
        self._versions = [tensor._version for tensor in self.tensors.values()]


class ScriptModel(Versions):
    """A TorchScript archive; in evaluation mode but for what is switched on."""

    def __init__(self, module: Any) -> None:
        self.module = module
        module.eval()
        super().__init__(dict(module.state_dict(keep_vars=True)), memory_of(module))

    def run(self, inputs: tuple[Tensor, ...]) -> Any:
        return self.module(*inputs)

    def dropout(self, *, on: bool) -> int:
        layers = [layer for layer in self._named(DROPOUT) if _can_switch(layer)]
        for layer in layers:
            layer.train(on)
        return len(layers)

    def norms(self, *, on: bool) -> list[tuple[Tensor, Tensor]] | None:
        layers = list(self._norms())
        if not all(map(_can_switch, layers)):
            return None
        for layer in layers:
            layer.train(on)
            if on:
                layer.num_batches_tracked.zero_()
        return [(layer.running_mean, layer.running_var) for layer in layers]

    def read(self) -> list[float]:
        # Without momentum a layer averages over all batches, of which there is always one here.
        return [1.0 if layer.momentum is None else layer.momentum for layer in self._norms()]

    def layers(self) -> list[tuple[str, str]]:
        modules = self.module.named_modules(remove_duplicate=False)
        return [(path, str(getattr(module, "original_name", ""))) for path, module in modules]

    def parameters(self) -> list[tuple[str, Tensor]]:
        return list(self.module.named_parameters(remove_duplicate=False))

    def _norms(self) -> Iterator[Any]:
        for layer in self._named(BATCH_NORM):
            if isinstance(getattr(layer, "running_mean", None), Tensor):
                yield layer

    def _named(self, names: frozenset[str]) -> Iterator[Any]:
        for layer in self.module.modules():
            if getattr(layer, "original_name", "") in names:
                yield layer


def _can_switch(layer: Any) -> bool:
    """Whether its code asks for the mode; a traced one had it when it was traced."""
    return hasattr(layer, "training") and bool(SWITCHED.search(layer.code))


def load(kind: str, file: BinaryIO, device: str) -> Model:
    """The program, from the start of the file."""
    file.seek(0)
    if kind == "exported":
        from fl_server_ai.sandbox.exported_loading import load_exported

        return load_exported(file, device)
    return ScriptModel(torch.jit.load(file, map_location=device))  # type: ignore[no-untyped-call]
