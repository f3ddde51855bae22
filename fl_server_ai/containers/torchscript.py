"""What `torch.jit.save` writes: a torch archive whose code says which tensors are parameters or buffers."""

from fl_server_ai.containers.container import CONTAINERS
from fl_server_ai.containers.torch_save import TorchSave


@CONTAINERS.register("torchscript")
class TorchScript(TorchSave):
    name = "torchscript"
    kind = "a TorchScript archive"
