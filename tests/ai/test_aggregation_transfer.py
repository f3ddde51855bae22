"""A device beside the host: the order of what it does, checked without one; and what happens where it is too small."""

import threading
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from traceback import clear_frames
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fl_server_ai.aggregation import STRATEGIES, UpdateMeta
from fl_server_ai.aggregation import engine as engine_module
from fl_server_ai.aggregation import slices as slices_module
from fl_server_ai.aggregation.combination import Combination, Inputs
from fl_server_ai.aggregation.engine import Aggregated, UpdateFile, aggregate
from fl_server_ai.aggregation.fold import Folder
from fl_server_ai.aggregation.transfer import CudaQueue
from fl_server_ai.testing import Rounds, furnished
from fl_server_ai.testing.rounds import Result, masks
from fl_server_ai.testing.rounds import random_model as kit_model
from tests.ai.simulated_gpu import Gpu, Race, simulate
from tests.ai.test_aggregation import random_models, write
from tests.ai.test_aggregation_slices import masked

CPU = torch.device("cpu")
N = 7
PARTS = "updates that leave things out, and one from an older model"
AVERAGED = f"{PARTS}, averaged"
CASES = {**{name: name for name in STRATEGIES}, PARTS: "FedAdam", AVERAGED: "FedAvg"}
# Whole-number weights, correct rounding, or no sums at all.
EXACT = ("FedAvg", "FedAvgM", "FedMedian", "TrimmedMean", AVERAGED)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return simulate(monkeypatch)


def made(
    folder: Path, name: str, device: str = "cpu", threads: int = 2
) -> tuple[Aggregated, bytes]:
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
        threads=threads,
        block=64,
    )
    return result, (folder / "out").read_bytes() + (state.read_bytes() if state.exists() else b"")


def rounds_on(folder: Path, case: str, device: str) -> list[Result]:
    """Two rounds of the kit's inputs, with tensors of all dtypes beside its own."""
    kind = STRATEGIES[CASES[case]]
    kit = Rounds(kind, folder, device=device)
    base, *models = ({**kit_model(seed), **one} for seed, one in enumerate(random_models(12)))
    if kind.takes == "mask":
        base = {key: t.sigmoid() if t.is_floating_point() else t for key, t in base.items()}
        models = masks(models)
    kit.base = kit.write(base)
    kit.updates = [
        UpdateFile(kit.write(model), UpdateMeta(f"{k:03}", k % 4 + 1))
        for k, model in enumerate(models)
    ]
    if case in (PARTS, AVERAGED):
        older, late = kit.write({**kit_model(50), **random_models(1, 50)[0]}), kit.updates[1]
        kit.updates = masked(kit.updates)
        kit.updates[1] = replace(late, start=older, meta=replace(late.meta, discount=0.5))
    first = kit.run(block=256, threads=2)
    second = kit.run(kit.sent(1), after=first, number=1, block=256, threads=2)
    return [first, second]


def assert_as_close_as_documented(folder: Path, case: str) -> None:
    for place in ("cpu", "cuda"):
        (folder / place).mkdir()
    expected = rounds_on(folder / "cpu", case, "cpu")

    got = rounds_on(folder / "cuda", case, "cuda")

    if case in EXACT:
        assert [one.all for one in got] == [one.all for one in expected]
    for one, other in zip(got, expected, strict=True):
        assert_close(one.out, other.out)
        assert (one.state_out is None) == (other.state_out is None)
        if one.state_out is not None and other.state_out is not None:
            assert_close(one.state_out, other.state_out)


def assert_close(got: Path, expected: Path) -> None:
    wanted = load_file(expected)
    for key, tensor in load_file(got).items():
        if tensor.is_floating_point():
            tolerance = 8 * torch.finfo(tensor.dtype).eps
            torch.testing.assert_close(tensor, wanted[key], rtol=tolerance, atol=tolerance)
        else:
            assert torch.equal(tensor, wanted[key])


@pytest.mark.parametrize("case", CASES)
def test_streams_race_for_no_memory_and_make_what_the_cpu_does(
    case: str, tmp_path: Path, gpu: Gpu
) -> None:
    assert_as_close_as_documented(tmp_path, case)

    assert gpu.operations > 100
    assert gpu.most == 2  # one block is copied while the other is read
    assert gpu.faults == []


NOWHERE = (Folder, "on_device", lambda _: nullcontext(), "before another stream was done")
BROKEN = {
    "a mean is taken on no stream": ("FedAvg", *NOWHERE),
    "ranks are found on no stream": ("FedMedian", *NOWHERE),
    "products are made on no stream": ("Krum", *NOWHERE),
    "the largest is looked for on no stream": ("AdaptiveZeroing", *NOWHERE),
    "the host does not wait for a copy": (
        "FedAvg", CudaQueue, "wait", lambda *_: None, "read over while it was copied",
    ),
    "a copy does not wait for what is worked out": (
        "FedAvg", CudaQueue, "mark", lambda _: torch.cuda.Event(), "before another stream was done",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_order_that_is_left_to_chance_would_be_noticed(
    what: str, tmp_path: Path, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, where, method, instead, said = BROKEN[what]
    monkeypatch.setattr(where, method, instead)

    with pytest.raises(Race, match=said) as caught:
        made(tmp_path, name, "cuda", threads=1)

    clear_frames(caught.tb)  # what they hold is put away while there is a GPU


def test_memory_that_is_given_back_too_early_would_be_noticed(gpu: Gpu) -> None:
    def work() -> None:
        mine, other = torch.cuda.Stream(), torch.cuda.Stream()
        with torch.cuda.stream(mine):
            blocks = [torch.zeros(1, device="cuda") for _ in range(2)]
        other.wait_event(mine.record_event())
        with torch.cuda.stream(other):
            sum(blocks)
        blocks[0].record_stream(other)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()

    assert gpu.faults == ["memory was given back while another stream worked on it"]


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
@pytest.mark.parametrize("case", CASES)
def test_a_gpu_is_as_close_to_the_cpu_as_the_documentation_says(case: str, tmp_path: Path) -> None:
    torch.cuda.reset_peak_memory_stats()

    assert_as_close_as_documented(tmp_path, case)

    assert torch.cuda.max_memory_allocated() > 0
