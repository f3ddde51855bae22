"""Predictions through the sandbox are those of torch itself, draw by draw, and leave the program as it was."""

import logging
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fl_server_ai.sandbox.errors import InputShape, NoDropout, ProgramFailed
from fl_server_ai.sandbox.parent import SandboxPool
from fl_server_ai.sandbox.plans import Drawn, Dropout, Plain
from fl_server_ai.sandbox.programs import Kind, Program
from fl_server_ai.sandbox.tensors import RawTensor
from fl_server_core.exceptions import Invalid, KeyMismatch, ShapeMismatch
from tests.ai.torch_files import scripted

KINDS: tuple[Kind, Kind] = ("torchscript", "exported")


def raw(tensor: Tensor, name: str = "") -> RawTensor:
    return RawTensor.of(tensor.detach().numpy(), name)


def values(output: RawTensor) -> Tensor:
    return torch.from_numpy(output.numpy().copy())


def network() -> nn.Module:
    """Images of 1 x 8 x 8 to three numbers."""
    torch.manual_seed(7)
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 3)
    )  # fmt: skip
    network[1].running_mean.normal_()
    return network.eval()


def images(count: int = 5, seed: int = 1) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.manual_seed(seed))


def program(
    module: nn.Module, folder: Path, kind: Kind = "torchscript", name: str = "m"
) -> Program:
    """The module's file, of either kind."""
    path = folder / f"{name}.{kind}"
    if kind == "torchscript":
        scripted(module, path)
    else:
        free = ({0: torch.export.Dim.DYNAMIC},)
        torch.export.save(torch.export.export(module, (images(2),), dynamic_shapes=free), path)
    return Program(path, str(path), kind)


@pytest.fixture(scope="module")
def pool() -> Iterator[SandboxPool]:
    with SandboxPool(threads=1, memory=2**30) as pool:
        yield pool


@pytest.fixture(scope="module", params=KINDS)
def known(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Program:
    """`network()` as either kind; read-only, one warm child for all tests."""
    return program(network(), tmp_path_factory.mktemp("known"), request.param)


def test_a_plain_prediction_is_torchs_own(pool: SandboxPool, known: Program) -> None:
    (output,) = pool.predict(known, [raw(images())], Plain())

    assert output.dtype == "F32"
    assert output.finite
    torch.testing.assert_close(values(output), network()(images()))


def test_a_warm_program_answers_from_the_same_child(pool: SandboxPool, known: Program) -> None:
    pool.predict(known, [raw(images())], Plain())
    before = pool.pids

    pool.predict(known, [raw(images(2))], Plain())

    assert pool.pids == before


def test_dropout_draws_differ_and_are_repeatable(pool: SandboxPool, known: Program) -> None:
    first = pool.predict(known, [raw(images())], Dropout(4, seed=3))

    again = pool.predict(known, [raw(images())], Dropout(6, seed=3))
    other = pool.predict(known, [raw(images())], Dropout(4, seed=4))

    assert len({bytes(output.data) for output in first}) == 4
    assert [o.data for o in again[:4]] == [o.data for o in first]
    assert [o.data for o in other] != [o.data for o in first]


def test_only_dropout_layers_are_switched_on(pool: SandboxPool, known: Program) -> None:
    outputs = pool.predict(known, [raw(images())], Dropout(400, seed=1))
    after = pool.predict(known, [raw(images())], Plain())[0]

    mean = torch.stack([values(o).double() for o in outputs]).mean(0)
    # Dropout before a linear layer keeps the mean, and BatchNorm in training would not.
    assert (mean - network()(images()).double()).abs().max() < 0.2
    torch.testing.assert_close(values(after), network()(images()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_program_without_dropout_says_so(pool: SandboxPool, tmp_path: Path, kind: Kind) -> None:
    bare = program(nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), tmp_path, kind)

    with pytest.raises(NoDropout, match=r"nn\.Dropout") as caught:
        pool.predict(bare, [raw(images())], Dropout(2))

    assert caught.value.error_code == "NO_DROPOUT"


@pytest.mark.filterwarnings("ignore:.*torch.jit.:DeprecationWarning")
def test_dropout_that_a_trace_has_fixed_is_not_taken_for_dropout(
    pool: SandboxPool, tmp_path: Path
) -> None:
    torch.jit.save(torch.jit.trace(network(), images()), tmp_path / "traced.pt")
    traced = Program(tmp_path / "traced.pt", "traced", "torchscript")

    assert values(pool.predict(traced, [raw(images())], Plain())[0]).shape == (5, 3)
    with pytest.raises(NoDropout):
        pool.predict(traced, [raw(images())], Dropout(2))
    weights, batches = state(network()), ((raw(images()),),)
    with pytest.raises(ProgramFailed, match="BatchNorm") as caught:
        pool.predict(traced, [raw(images())], Drawn(lambda: iter([weights]), calibration=batches))
    assert caught.value.error_code == "BATCH_NORM_FIXED"


def state(module: nn.Module) -> list[RawTensor]:
    return [raw(tensor, name) for name, tensor in module.state_dict().items()]


def members(count: int) -> list[nn.Module]:
    """Networks of one architecture with other numbers."""
    found = []
    for index in range(count):
        module = network()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.manual_seed(index))
        found.append(module)
    return found


def test_each_weight_set_makes_its_draw_and_the_programs_own_come_back(
    pool: SandboxPool, known: Program
) -> None:
    alive: list[int] = []

    def weights() -> Iterator[Iterable[RawTensor]]:
        for index, member in enumerate(members(3)):
            alive.append(index)
            yield state(member)
        yield [raw(torch.zeros(3), "5.bias")]

    outputs = pool.predict(known, [raw(images())], Drawn(weights))
    after = pool.predict(known, [raw(images())], Plain())[0]

    assert alive == [0, 1, 2]
    for output, member in zip(outputs[:3], members(3), strict=True):
        torch.testing.assert_close(values(output), member(images()))
    bare = network()
    bare[5].bias.data.zero_()
    torch.testing.assert_close(values(outputs[3]), bare(images()))
    torch.testing.assert_close(values(after), network()(images()))


def test_statistics_are_taken_anew_as_update_bn_does(pool: SandboxPool, known: Program) -> None:
    batches = [images(4, seed) for seed in (11, 12, 13)]
    calibration = tuple((raw(batch),) for batch in batches)
    member = members(1)[0]
    layers: list[int] = []

    (output,) = pool.predict(
        known,
        [raw(images())],
        Drawn(lambda: iter([state(member)]), calibration=calibration, calibrated=layers.append),
    )
    after = pool.predict(known, [raw(images())], Plain())[0]

    torch.optim.swa_utils.update_bn(batches, member)
    torch.testing.assert_close(values(output), member.eval()(images()), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(values(after), network()(images()))
    assert layers == [1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_program_without_statistics_is_not_calibrated_and_says_so(
    pool: SandboxPool, tmp_path: Path, kind: Kind
) -> None:
    torch.manual_seed(2)
    bare = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    layers: list[int] = []
    plan = Drawn(
        lambda: iter([state(bare)]), calibration=((raw(images()),),), calibrated=layers.append
    )

    (output,) = pool.predict(program(bare, tmp_path, kind), [raw(images())], plan)

    assert layers == [0]
    torch.testing.assert_close(values(output), bare(images()))


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_statistics_that_an_export_has_fixed_are_refused(pool: SandboxPool, tmp_path: Path) -> None:
    path = tmp_path / "decomposed.pt2"
    exported = torch.export.export(network(), (images(5),)).run_decompositions()
    torch.export.save(exported, path)
    plan = Drawn(lambda: iter([state(network())]), calibration=((raw(images()),),))

    with pytest.raises(ProgramFailed, match="without decompositions") as caught:
        pool.predict(Program(path, "decomposed", "exported"), [raw(images())], plan)

    assert caught.value.error_code == "BATCH_NORM_FIXED"


@pytest.mark.parametrize(
    ("tensor", "error"),
    [
        (raw(torch.zeros(3), "6.bias"), KeyMismatch),
        (raw(torch.zeros(4), "5.bias"), ShapeMismatch),
        (raw(torch.zeros(3, dtype=torch.float64), "5.bias"), ShapeMismatch),
    ],
)
def test_weights_that_do_not_fit_are_named(
    pool: SandboxPool, known: Program, tensor: RawTensor, error: type[Exception]
) -> None:
    with pytest.raises(error, match=tensor.name):
        pool.predict(known, [raw(images())], Drawn(lambda: iter([[tensor]])))

    after = pool.predict(known, [raw(images())], Plain())[0]
    torch.testing.assert_close(values(after), network()(images()))


def test_weights_that_cannot_be_read_leave_no_program_half_overwritten(
    pool: SandboxPool, known: Program
) -> None:
    def weights() -> Iterator[Iterable[RawTensor]]:
        yield state(members(1)[0])
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="disk"):
        pool.predict(known, [raw(images())], Drawn(weights))

    after = pool.predict(known, [raw(images())], Plain())[0]
    torch.testing.assert_close(values(after), network()(images()))


class Counts(nn.Module):
    """Answers how often it was called, in a dict; writes to what it is given."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(2, dtype=torch.int64))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        x.zero_()
        return {"calls": self.calls.clone(), "more": x}


def test_what_a_program_writes_to_itself_is_gone_with_the_request(
    pool: SandboxPool, tmp_path: Path
) -> None:
    counts = program(Counts(), tmp_path)

    found = [values(pool.predict(counts, [raw(images())], Plain())[0]).tolist() for _ in range(3)]

    assert found == [[1, 1]] * 3


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.rand(3) + 0 * x.sum()


def test_a_program_that_draws_itself_is_repeatable(pool: SandboxPool, tmp_path: Path) -> None:
    noise = program(Noise(), tmp_path)

    one, two, other = (
        pool.predict(noise, [raw(images())], Plain(seed))[0].data for seed in (1, 1, 2)
    )

    assert one == two != other


class Answers(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.float64).reshape(2, 3).T,
        np.array(3, np.int64),
        np.zeros((0, 4), np.float32),
        np.array([True, False]),
        np.array([1.5, np.nan, np.inf], np.float16),
        np.array([1 + 2j], np.complex64),
        np.arange(4, dtype=np.uint8)[::2],
        np.arange(4, dtype=">i4"),
    ],
    ids=str,
)
def test_numbers_of_every_kind_come_through_as_they_are(
    pool: SandboxPool, tmp_path: Path, array: np.ndarray[Any, Any]
) -> None:
    same = Program(program(Answers(), tmp_path).path, "answers", "torchscript")

    (output,) = pool.predict(same, [RawTensor.of(array)], Plain())

    assert output.numpy().dtype == array.dtype.newbyteorder("<")
    np.testing.assert_array_equal(output.numpy(), array)
    assert output.finite == (array.dtype.kind not in "fc" or bool(np.isfinite(array).all()))


def test_bfloat16_comes_through(pool: SandboxPool, tmp_path: Path) -> None:
    same = Program(program(Answers(), tmp_path).path, "answers", "torchscript")
    numbers = torch.tensor([1.5, -2.0, float("nan")], dtype=torch.bfloat16)
    sent = RawTensor("BF16", (3,), numbers.view(torch.uint8).numpy().tobytes())

    (output,) = pool.predict(same, [sent], Plain())

    assert output.data == sent.data
    np.testing.assert_array_equal(output.numpy(), numbers.float().numpy())


class Raises(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("no \x1b[31mred\x07 /work/secret/place/model.py, 3 channels only")


def test_a_programs_error_is_told_without_controls_and_folders(
    pool: SandboxPool, tmp_path: Path
) -> None:
    failing = program(Raises(), tmp_path)

    with pytest.raises(ProgramFailed, match="3 channels only") as caught:
        pool.predict(failing, [raw(images())], Plain())

    assert "\x1b" not in caught.value.detail
    assert "secret" not in caught.value.detail
    assert len(caught.value.detail) <= 602


def test_wrong_shapes_fail_with_the_programs_own_words(pool: SandboxPool, known: Program) -> None:
    with pytest.raises((ProgramFailed, InputShape), match=r"shape|size|channels") as caught:
        pool.predict(known, [raw(torch.zeros(1, 2, 8, 8))], Plain())

    assert isinstance(caught.value, InputShape) == (known.kind == "exported")
    assert "Traceback" not in caught.value.detail.partition("\n")[0]  # the reason comes first
    assert "DYNAMIC" not in caught.value.detail  # it was not the batch that was wrong
    assert pool.predict(known, [raw(images())], Plain())


class Words(nn.Module):
    def forward(self, x: Tensor) -> list[str]:
        return ["no", "tensor"]


def test_an_answer_without_a_tensor_is_the_programs_failure(
    pool: SandboxPool, tmp_path: Path
) -> None:
    with pytest.raises(ProgramFailed, match="no tensor"):
        pool.predict(program(Words(), tmp_path), [raw(images())], Plain())


@pytest.mark.parametrize("draws", [0, -1, 10_001])
def test_draws_are_counted(pool: SandboxPool, known: Program, draws: int) -> None:
    with pytest.raises(Invalid):
        pool.predict(known, [raw(images())], Dropout(draws))


def test_the_least_recently_used_program_gives_way(tmp_path: Path) -> None:
    first, second, third = (program(Answers(), tmp_path, name=name) for name in "abc")
    x = [raw(images(1))]

    with SandboxPool(children=2, threads=1) as pool:
        pool.predict(first, x, Plain())
        pool.predict(second, x, Plain())
        old = pool.pids
        pool.predict(first, x, Plain())
        pool.predict(third, x, Plain())

        assert pool.pids[0] == old[0]
        assert old[1] not in pool.pids
        with pytest.raises(ProcessLookupError):
            os.kill(old[1], 0)
    assert pool.pids == []


def test_tenants_share_no_child(tmp_path: Path) -> None:
    path = program(Answers(), tmp_path).path

    with SandboxPool(threads=1) as pool:
        for tenant in ("ada", "grace", "ada"):
            pool.predict(Program(path, "d", "torchscript", tenant), [raw(images(1))], Plain())

        assert len(pool.pids) == 2


def test_what_a_child_is_kept_from_is_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "fl.celery"), SandboxPool(threads=1) as pool:
        for name in "ab":
            same = program(Answers(), tmp_path, name=name)
            pool.predict(same, [raw(images(1))], Plain())

    off = [n for n, told in pool.protections.items() if told.startswith("off")]
    assert len([r for r in caplog.records if r.message.startswith("sandbox without")]) == len(off)
    assert len([r for r in caplog.records if r.message.startswith("sandbox:")]) == 1


def test_the_worker_needs_no_torch() -> None:
    code = "import sys, fl_server_ai.sandbox.parent; print('torch' in sys.modules, 'django' in sys.modules)"

    found = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)

    assert found.stdout.split() == ["False", "False"]
