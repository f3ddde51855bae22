"""Inputs prepared in the sandbox: before programs of both kinds, in flat memory, and refused without harm to the child."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from torch import Tensor, nn

from fl_server_ai.preprocessing.pipeline import document_of, parse
from fl_server_ai.sandbox.errors import (
    BadImage,
    ImageTooLarge,
    InputShape,
    PreprocessingFailed,
    SandboxMemory,
)
from fl_server_ai.sandbox.image_steps import carried_out
from fl_server_ai.sandbox.parent import SandboxPool
from fl_server_ai.sandbox.plans import Drawn, Dropout, Plain
from fl_server_ai.sandbox.preparation import Preparation
from fl_server_ai.sandbox.programs import Program
from fl_server_ai.sandbox.tensors import RawTensor
from fl_server_core.exceptions import DomainError
from tests.ai.test_sandbox import KINDS, images, network, program, raw, values
from tests.ai.torch_files import scripted
from tests.api import images as files

PIPELINE = parse(
    {"steps": [{"step": "to_tensor"}, {"step": "grayscale"}, {"step": "resize", "size": [8, 8]}]}
)
PREPARED = Preparation(
    image=True, pixels=10_000_000, steps=document_of(PIPELINE), shape=[None, 1, 8, 8]
)


class Shifted(nn.Module):
    """Preprocessing with a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(0.25))

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 - self.shift


@pytest.fixture(scope="module")
def pool() -> Iterator[SandboxPool]:
    with SandboxPool(threads=1, memory=2**30) as pool:
        yield pool


@pytest.fixture(scope="module", params=KINDS)
def known(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Program:
    return program(network(), tmp_path_factory.mktemp("known"), request.param)


def picture(data: bytes) -> RawTensor:
    return RawTensor("U8", (len(data),), data, "image")


def before(folder: Path, module: nn.Module) -> Program:
    path = folder / "before.pt"
    scripted(module, path)
    return Program(path, str(path), "torchscript")


def test_an_image_through_a_pipeline_is_what_the_program_sees(
    pool: SandboxPool, known: Program
) -> None:
    colours = files.pixels(20, 31)

    (output,) = pool.predict(
        known, [picture(files.encoded(colours))], Plain(), preparation=PREPARED
    )

    given = carried_out(PIPELINE, torch.from_numpy(colours.transpose(2, 0, 1).copy()))
    torch.testing.assert_close(values(output), network()(given))


def test_all_draws_see_the_prepared_input(pool: SandboxPool, known: Program) -> None:
    colours = files.pixels(20, 31)
    given = carried_out(PIPELINE, torch.from_numpy(colours.transpose(2, 0, 1).copy()))
    sent = [picture(files.encoded(colours))]
    weights = [
        raw(tensor * 2, name) for name, tensor in network().state_dict().items() if "weight" in name
    ]
    drawn = Drawn(lambda: iter([weights, weights]), 5, ((raw(images(4)),),))

    for plan in (Dropout(3, seed=5), drawn):
        prepared = pool.predict(known, sent, plan, preparation=PREPARED)
        plain = pool.predict(known, [raw(given)], plan)
        for one, other in zip(prepared, plain, strict=True):
            torch.testing.assert_close(values(one), values(other))


def test_a_module_goes_before_programs_of_both_kinds(
    pool: SandboxPool, known: Program, tmp_path: Path
) -> None:
    chained = dataclasses.replace(known, before=before(tmp_path, Shifted()))

    (output,) = pool.predict(chained, [raw(images())], Plain())
    (alone,) = pool.predict(known, [raw(images())], Plain())

    torch.testing.assert_close(values(output), network()(images() * 2 - 0.25))
    torch.testing.assert_close(values(alone), network()(images()))


def test_a_module_before_may_not_use_forbidden_operators(
    pool: SandboxPool, known: Program, tmp_path: Path
) -> None:
    class Reads(Shifted):
        def forward(self, x: Tensor) -> Tensor:
            return torch.from_file("/etc/passwd", shared=False, size=4)

    chained = dataclasses.replace(known, before=before(tmp_path, Reads()))

    with pytest.raises(DomainError) as caught:
        pool.predict(chained, [raw(images())], Plain())

    assert caught.value.error_code == "FORBIDDEN_OPERATOR"


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (files.bomb(), ImageTooLarge),
        (files.encoded(files.pixels(64, 64))[:-3000], BadImage),
        (files.encoded(files.pixels(4, 4), "GIF"), BadImage),
        (files.encoded(files.pixels(4, 4), "TIFF"), BadImage),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", BadImage),
        (files.text_bomb(), BadImage),
    ],
    ids=["bomb", "cut off", "gif", "tiff", "postscript", "text bomb"],
)
def test_what_cannot_be_decoded_is_refused_and_the_child_stays(
    pool: SandboxPool, known: Program, data: bytes, kind: type[DomainError]
) -> None:
    pool.predict(known, [raw(images())], Plain())
    pids = pool.pids

    for plan in (Plain(), Drawn(lambda: iter([[]]))):
        with pytest.raises(kind):
            pool.predict(known, [picture(data)], plan, preparation=PREPARED)

    assert pool.pids == pids
    (output,) = pool.predict(known, [raw(images())], Plain())
    torch.testing.assert_close(values(output), network()(images()))


def test_a_misfit_and_a_step_that_fails_leave_the_child_alone(
    pool: SandboxPool, known: Program
) -> None:
    pool.predict(known, [raw(images())], Plain())
    pids = pool.pids
    data = picture(files.encoded(files.pixels(9, 9)))

    with pytest.raises(InputShape, match="dimension 1 is 3 instead of 1"):
        pool.predict(known, [data], Plain(), preparation=dataclasses.replace(PREPARED, steps=None))
    crop = {"step": "crop", "top": 0, "left": 0, "height": 99, "width": 9}
    with pytest.raises(PreprocessingFailed, match="crop: it reaches beyond an image of 9 x 9"):
        pool.predict(
            known,
            [data],
            Plain(),
            preparation=dataclasses.replace(PREPARED, steps={"steps": [crop]}),
        )

    assert pool.pids == pids


def test_memory_stays_flat_over_many_images(pool: SandboxPool, known: Program) -> None:
    data = picture(files.encoded(np.zeros((1500, 2000, 3), np.uint8)))
    for _ in range(3):
        pool.predict(known, [data], Plain(), preparation=PREPARED)
    child = psutil.Process(pool.pids[-1])
    start = child.memory_info().rss

    for _ in range(20):
        pool.predict(known, [data], Plain(), preparation=PREPARED)

    # One of them takes 9 MB of bytes and 36 MB of floats; the allocator keeps a buffer of one, or not.
    assert child.memory_info().rss - start < 60 * 2**20


def test_a_module_before_that_is_too_large_is_refused(tmp_path: Path) -> None:
    chained = dataclasses.replace(program(network(), tmp_path), before=before(tmp_path, Shifted()))

    with SandboxPool(threads=1, memory=2**10) as small, pytest.raises(SandboxMemory):
        small.predict(chained, [raw(images())], Plain())
