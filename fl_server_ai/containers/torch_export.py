"""What `torch.export.save` writes (.pt2): a graph as JSON, and raw tensors that a JSON table describes."""

from pathlib import Path

from fl_server_ai.containers.container import CONTAINERS
from fl_server_ai.containers.limits import Limits
from fl_server_ai.containers.torch_archive.archive import checked_blocks
from fl_server_ai.containers.torch_archive.exports import MODEL, NUMBERS
from fl_server_ai.containers.torch_archive.reading import open_weights
from fl_server_ai.containers.torch_save import TorchSave
from fl_server_ai.containers.unread import EXPORTED


@CONTAINERS.register("torch_export")
class TorchExport(TorchSave):
    name = "torch_export"
    kind = EXPORTED

    def extract(self, source: Path, target: Path, limits: Limits) -> str:
        digest = super().extract(source, target, limits)
        try:
            _check_rest(source, limits)
        except BaseException:
            target.unlink()
            raise
        return digest


def _check_rest(source: Path, limits: Limits) -> None:
    """The CRCs of the graph and of constants: they are not weights, but part of every answer."""
    with open_weights(source, limits) as weights:
        used = {entry.name for entry in weights.storages()}
        for name, entry in weights.archive.entries.items():
            if (name == MODEL or NUMBERS.fullmatch(name)) and entry.name not in used:
                for _ in checked_blocks(weights.archive.file, entry):
                    pass
