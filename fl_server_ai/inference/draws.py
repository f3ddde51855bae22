"""Which draws of a program a method needs, and with which weights."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fl_server_ai.aggregation.statistics import is_statistic
from fl_server_ai.aggregation.stored import Stored
from fl_server_ai.containers import read_manifest
from fl_server_ai.sandbox.plans import Drawn, Dropout, Plain, Plan
from fl_server_ai.sandbox.tensors import RawTensor
from fl_server_ai.uncertainty import Kind, Method
from fl_server_ai.uncertainty.methods.swag import SWAGOptions
from fl_server_ai.uncertainty.swag import draw_weights
from fl_server_core.exceptions import Unusable
from fl_server_core.models import Blob, InferenceJob, Training
from fl_server_core.services.moments import combined_moments
from fl_server_core.storage import local_path

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@contextmanager
def draws_of(method: Method[Any], job: InferenceJob, weights: Path) -> Iterator[Plan]:
    """The plan for the sandbox while its files are open; `weights` is the canonical file of the program's."""
    wanted = method.plan()
    if wanted.kind == Kind.PLAIN:
        yield Plain(wanted.seed)
    elif wanted.kind == Kind.DROPOUT:
        yield Dropout(wanted.draws or 1, wanted.seed)
    elif wanted.kind == Kind.WEIGHTS:
        with _swag(method.options, job, weights) as sets:
            yield Drawn(sets, wanted.seed)
    else:
        raise Unusable("only a MEAN model has members", code="NO_MEMBERS")


@contextmanager
def _swag(
    options: SWAGOptions, job: InferenceJob, weights: Path
) -> Iterator[Callable[[], Iterator[Iterable[RawTensor]]]]:
    """SWAG's weight sets (arXiv:1902.02476): what has moments is drawn, the rest stays the version's."""
    training = Training.objects.filter(model=job.model_id).first()
    moments = combined_moments(training) if training else None
    if moments is None or moments.first is None or moments.second is None:
        raise Unusable("no SWAG round of this model has ended yet", code="NO_MOMENTS")
    floats = {i.name: DTYPES[i.dtype] for i in read_manifest(weights).tensors if i.dtype in DTYPES}
    with ExitStack() as stack:
        second = Stored(stack.enter_context(local_path(moments.second)), stack, among=floats)
        first = Stored(stack.enter_context(local_path(moments.first)), stack, among=second)
        deviations = None
        if moments.deviations is not None:
            path = stack.enter_context(local_path(moments.deviations))
            deviations = Stored(path, stack, among=second)

        def one(draw: int) -> Iterator[RawTensor]:
            pairs = draw_weights(
                first, second, seed=options.seed, draw=draw, scale=options.scale, eps=options.eps,
                keep=[name for name in second if is_statistic(name)], deviations=deviations,
            )  # fmt: skip
            for name, tensor in pairs:
                yield as_raw(tensor.to(floats[name]), name)

        yield lambda: (one(draw) for draw in range(options.N))


def weights_of(blob: Blob) -> Iterator[RawTensor]:
    """A stored weight set, tensor by tensor; the file is open while it is read."""
    with ExitStack() as stack:
        path = stack.enter_context(local_path(blob))
        infos = read_manifest(path).tensors
        stored = Stored(path, stack, among={info.name for info in infos})
        for info in infos:
            yield as_raw(stored[info.name], info.name)


def as_raw(tensor: Tensor, name: str = "") -> RawTensor:
    """For the sandbox, of any dtype that it carries."""
    if tensor.dtype == torch.bfloat16:  # which numpy lacks
        data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
        return RawTensor("BF16", tuple(tensor.shape), data, name)
    return RawTensor.of(tensor.numpy(), name)


def as_tensor(raw: RawTensor) -> Tensor:
    """What the sandbox answered; bfloat16 as float32, with the same values."""
    return torch.from_numpy(raw.numpy().copy())
