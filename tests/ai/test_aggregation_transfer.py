"""A device beside the host: the same lanes with a device that keeps a record, and what happens where it is too small."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fl_server_ai.aggregation import STRATEGIES, fold
from fl_server_ai.aggregation import engine as engine_module
from fl_server_ai.aggregation import slices as slices_module
from fl_server_ai.aggregation.combination import Combination, Inputs
from fl_server_ai.aggregation.engine import Aggregated, aggregate
from fl_server_ai.aggregation.transfer import Mark
from fl_server_ai.testing import furnished
from tests.ai.test_aggregation import random_models, write

CPU = torch.device("cpu")
EXACT = ("FedAvg", "FedAvgM", "FedMedian", "TrimmedMean")  # whole-number weights, or no sums at all
N = 7


class Recorder:
    """The CPU as the device: does at once what it is told, and refuses what a real one would get wrong."""

    def __init__(self) -> None:
        self.now = 0
        self.under_way: dict[int, tuple[int, torch.Tensor, torch.Tensor]] = {}
        self.handed: dict[int, int] = {}
        self.most = 0

    def calculating(self) -> AbstractContextManager[object]:
        return nullcontext()

    def host(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def room(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Mark | None) -> Mark:
        assert source.data_ptr() not in self.under_way, "read over while it was copied"
        used = self.handed.get(target.data_ptr())
        assert used is None or after is not None, "copied over while it was worked on"
        assert used is None or after > used, "the mark is older than the block"
        target.copy_(source)
        mark = self.mark()
        self.handed[target.data_ptr()] = mark
        self.under_way[source.data_ptr()] = mark, source, source.clone()
        self.most = max(self.most, len(self.under_way))
        return mark

    def mark(self) -> Mark:
        self.now += 1
        return self.now

    def wait(self, mark: Mark) -> None:
        for at, (until, source, before) in list(self.under_way.items()):
            if until <= mark:
                assert torch.equal(source.view(torch.uint8), before.view(torch.uint8)), (
                    "read over while it was copied"
                )
                del self.under_way[at]


def made(folder: Path, name: str, device: str = "cpu") -> tuple[Aggregated, bytes]:
    base, *models = random_models(N + 1)
    files = write(folder, [base, *models], [1] * (N + 1))
    strategy = STRATEGIES[name]()
    state = folder / "state"
    state.unlink(missing_ok=True)
    result = aggregate(
        base=files[0].path,
        updates=furnished(strategy, files[1:], folder),
        out=folder / "out",
        strategy=strategy,
        state_out=state,
        device=device,
        threads=2,
        block=64,
    )
    return result, (folder / "out").read_bytes() + (state.read_bytes() if state.exists() else b"")


@pytest.mark.parametrize("name", ["FedAvg", "FedAdam", "FedMedian", "Krum", "SCAFFOLD"])
def test_blocks_that_go_through_two_lanes_make_the_same_bytes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, plain = made(tmp_path, name)
    devices: list[Recorder] = []

    def queue_of(_: torch.device) -> Recorder:
        devices.append(Recorder())
        return devices[-1]

    monkeypatch.setattr(fold, "queue_of", queue_of)
    _, through = made(tmp_path, name)

    assert through == plain
    assert max(device.most for device in devices) == 2  # one is copied while the other is read


def test_a_lane_that_does_not_wait_would_be_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fold, "queue_of", lambda _: Recorder())
    monkeypatch.setattr(Recorder, "wait", lambda *_: None)

    with pytest.raises(AssertionError, match="read over while it was copied"):
        made(tmp_path, "FedAvg")


def too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that works for a while, and then has no memory left."""

    def combine(self: Combination, weights: Any, target: Any, spans: Any, device: Any, *rest: Any):
        if device.type == "cpu":
            return real(self, weights, target, spans, device, *rest)
        halves = [(first, (first + last) // 2) for first, last in spans]
        real(self, weights, target, halves, CPU, *rest)
        raise torch.OutOfMemoryError("no room on the GPU")

    real, survey = Combination.combine, Combination.survey
    monkeypatch.setattr(Combination, "combine", combine)
    monkeypatch.setattr(Combination, "survey", lambda self, _, *rest: survey(self, CPU, *rest))
    monkeypatch.setattr(engine_module, "resolve", lambda _: (torch.device("cuda:0"), []))


@pytest.mark.parametrize("name", ["FedAvg", "FedProx", "FedPM", "AdaptiveZeroing"])
def test_a_gpu_that_runs_out_of_memory_in_the_middle_leaves_a_warning_and_the_cpus_bytes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, plain = made(tmp_path, name)
    too_small(monkeypatch)

    result, again = made(tmp_path, name, "cuda")

    assert again == plain
    assert result.scalars == expected.scalars
    assert result.warnings == ["cuda:0 is out of memory; aggregated on the CPU"]
    assert not list(tmp_path.glob(".*.part"))


def test_so_does_a_slice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = write(tmp_path, random_models(3), [1, 2, 3])
    inputs = Inputs(None, files, STRATEGIES["FedAvg"]())
    survey = slices_module.read_survey([])
    one = {"index": 1, "of": 2, "out": tmp_path / "slice"}
    plain = slices_module.write_slice(inputs, survey, **one, device="cpu")
    too_small(monkeypatch)

    again = slices_module.write_slice(inputs, survey, **one, device="cuda")

    assert (again.digest, again.recipe) == (plain.digest, plain.recipe)
    assert again.warnings == ["cuda:0 is out of memory; aggregated on the CPU"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", list(STRATEGIES))
def test_a_gpu_is_as_close_to_the_cpu_as_the_documentation_says(name: str, tmp_path: Path) -> None:
    _, cpu = made(tmp_path, name)
    expected = load_file(tmp_path / "out")

    result, gpu = made(tmp_path, name, "cuda")

    assert result.warnings == []
    if name in EXACT:
        assert gpu == cpu
    for key, tensor in load_file(tmp_path / "out").items():
        if tensor.is_floating_point():
            tolerance = 8 * torch.finfo(tensor.dtype).eps
            torch.testing.assert_close(tensor, expected[key], rtol=tolerance, atol=tolerance)
        else:
            assert torch.equal(tensor, expected[key])
