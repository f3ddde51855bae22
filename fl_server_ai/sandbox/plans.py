"""Which draws a program makes of its prediction. The child carries them out; the worker averages them.

Draw i of seed s is preceded by the same `torch.manual_seed`, so that it is repeatable on the same machine.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from fl_server_ai.sandbox.tensors import RawTensor

# A draw's named tensors: asked for one draw at a time, so that only one of them is in memory.
Weights = Callable[[], Iterator[Iterable[RawTensor]]]


@dataclass(frozen=True)
class Plain:
    """One draw in evaluation mode, with the weights that the program came with."""

    seed: int = 0


@dataclass(frozen=True)
class Dropout:
    """Draws with dropout layers as in training, all else as in evaluation: MC dropout, arXiv:1506.02142.

    Only layers (`nn.Dropout*`, `nn.*AlphaDropout`; in exported programs: dropout operators), not
    `functional.dropout` in scripted code. `NO_DROPOUT` if there are none, or a trace has fixed them.
    """

    draws: int
    seed: int = 0


@dataclass(frozen=True)
class Drawn:
    """One draw per weight set that `weights()` yields: SWAG, and ensembles of one architecture.

    A set's tensors are copied over parameters and buffers of the same names; names that it leaves out keep the
    program's own values. `calibration` are batches (positional inputs each) over which the statistics of
    BatchNorm layers are taken anew for each draw: mean over batches, weighted equally, as
    `torch.optim.swa_utils.update_bn` does. Afterwards the program has its own weights again, and `calibrated`
    hears how many layers that were: 0 if the program has none.
    """

    weights: Weights
    seed: int = 0
    calibration: tuple[tuple[RawTensor, ...], ...] = ()
    calibrated: Callable[[int], None] | None = None


Plan = Plain | Dropout | Drawn
