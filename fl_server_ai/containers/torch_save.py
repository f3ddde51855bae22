"""What `torch.save` writes: an archive of a state dict, of a list of tensors, or of a whole module."""

from pathlib import Path

from fl_server_ai.containers.container import CONTAINERS, Container, Ties
from fl_server_ai.containers.limits import Limits
from fl_server_ai.containers.torch_archive.overwriting import check_overwritable, overwrite
from fl_server_ai.containers.torch_archive.reading import check_others, open_weights, view_blocks
from fl_server_ai.containers.unread import torch_kind
from fl_server_ai.containers.writing import write_canonical
from fl_server_core.exceptions import Unusable


@CONTAINERS.register("torch")
class TorchSave(Container):
    name = "torch"
    kind = "a torch.save archive"

    def matches(self, head: bytes, path: Path) -> bool:
        return torch_kind(head, path) == self.kind

    def extract(self, source: Path, target: Path, limits: Limits) -> str:
        with open_weights(source, limits) as weights:
            check_others(weights)
            return write_canonical(
                target, weights.layout(), lambda name: view_blocks(weights, name)
            )

    def template(self, source: Path, limits: Limits) -> Ties:
        with open_weights(source, limits) as weights:
            check_overwritable(weights, source.parent)
            return weights.ties()

    def write(self, canonical: Path, out: Path, template: Path | None = None) -> None:
        if template is None:
            raise Unusable(
                "only a model that was uploaded in this container can be given in it; "
                "ask for safetensors",
                code="NOT_REPRESENTABLE",
            )
        overwrite(template, canonical, out)
