"""A program answers as if each question were its first, whatever it does to itself."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Optional

import pytest
import torch
from torch import Tensor, nn

from fl_server_ai.sandbox.errors import ProgramFailed
from fl_server_ai.sandbox.loading import load
from fl_server_ai.sandbox.parent import SandboxPool
from fl_server_ai.sandbox.plans import Drawn, Plain
from tests.ai.test_sandbox import network, program, raw, values

ONE = raw(torch.ones(1, 2))


class Weighted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))


class Data(Weighted):
    """Past autograd's counters."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data.add_(x.sum())
        return x + self.weight


class Listed(Weighted):
    seen: list[float]

    def __init__(self) -> None:
        super().__init__()
        self.seen = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(1.0)
        return x + len(self.seen)


class Counted(Weighted):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return x + self.count


class PlainTensor(Weighted):
    """Neither a parameter nor a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = torch.zeros(2)

    def forward(self, x: Tensor) -> Tensor:
        self.kept.add_(1)
        return x + self.kept


class Maybe(Weighted):
    kept: Optional[Tensor]  # noqa: UP045 - TorchScript's word

    def __init__(self) -> None:
        super().__init__()
        self.kept = torch.zeros(2)

    def forward(self, x: Tensor) -> Tensor:
        kept = self.kept
        if kept is not None:
            kept.add_(1)
            x = x + kept
        return x


class Normalised(Weighted):
    """A kernel writes running statistics and counts nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("var", torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        y = x * torch.tensor([[1.0], [5.0]])
        torch.batch_norm(y, None, None, self.mean, self.var, True, 0.5, 1e-5, False)  # noqa: FBT003
        return x + self.mean


class Part(Weighted):
    """What a submodule keeps counts, too."""

    def __init__(self) -> None:
        super().__init__()
        self.part = Counted()

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x)


class Failing(Weighted):
    """Writes first, and then says no."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.add_(1)
        if bool(x.sum() < 0):
            raise ValueError("negative")
        return x + self.weight


@pytest.fixture(scope="module")
def pool() -> Iterator[SandboxPool]:
    with SandboxPool(threads=1, memory=2**30, children=1) as pool:
        yield pool


@pytest.mark.parametrize(
    "made", [Data, Listed, Counted, PlainTensor, Maybe, Normalised, Part], ids=lambda m: m.__name__
)
def test_nothing_survives_a_question(
    pool: SandboxPool, tmp_path: Path, made: Callable[[], nn.Module]
) -> None:
    one = program(made(), tmp_path)

    first, *others = [pool.predict(one, [ONE], Plain())[0] for _ in range(3)]
    drawn = Drawn(lambda: iter([[raw(torch.zeros(2), "weight")]]))
    pool.predict(one, [ONE], drawn)
    last = pool.predict(one, [ONE], Plain())[0]

    assert {bytes(output.data) for output in [*others, last]} == {bytes(first.data)}
    assert len(pool.pids) == 1


def test_nothing_survives_a_question_that_failed(pool: SandboxPool, tmp_path: Path) -> None:
    one = program(Failing(), tmp_path)

    with pytest.raises(ProgramFailed):
        pool.predict(one, [raw(-torch.ones(1, 2))], Plain())
    (answer,) = pool.predict(one, [ONE], Plain())

    torch.testing.assert_close(values(answer), torch.full((1, 2), 2.0))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (network(), (1, 1, 8, 8)),
        (nn.Sequential(nn.ReLU(inplace=True), nn.GroupNorm(1, 2), nn.InstanceNorm1d(2)), (1, 2, 4)),
        (Recurrent(), (1, 4, 2)),
    ],
    ids=["images", "in place", "recurrent"],
)
def test_usual_layers_need_not_be_loaded_again(
    tmp_path: Path, module: nn.Module, shape: tuple[int, ...]
) -> None:
    with program(module, tmp_path).path.open("rb") as file:
        model = load("torchscript", file, "cpu")

    with torch.inference_mode():
        model.run((torch.ones(shape),))

    assert not model.changed()
