"""Draws in the child: inputs and weights in, one tensor per draw out, the model left as it was."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fl_server_ai.sandbox.loading import Model
from fl_server_ai.sandbox.pipes import Pipes, Refusal

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "BOOL": torch.bool,
    "C64": torch.complex64,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
NESTED = 16

Received = list[tuple[str, str, tuple[int, ...], Any]]  # the last is a writable buffer


def predict(model: Model, header: Mapping[str, Any], received: Received, pipes: Pipes) -> None:
    """Carry out the plan in the header; each draw is an answer, and "done" is the last."""
    device = next((t.device for t in model.state().values()), torch.device(header["device"]))
    tensors = [made(t).to(device) for t in received]
    inputs = tuple(tensors[: header["inputs"]])
    batches, at = [], header["inputs"]
    for count in header["calibration"]:
        batches.append(tuple(tensors[at : at + count]))
        at += count
    norms = 0
    with torch.inference_mode():
        match header["plan"]:
            case "plain":
                _draw(model, inputs, header["seed"], 0, pipes)
            case "dropout":
                _with_dropout(model, inputs, header["draws"], header["seed"], pipes)
            case _:
                norms = _with_weights(model, inputs, header["seed"], batches, pipes)
    pipes.send({"done": True, "norms": norms})


def _with_dropout(
    model: Model, inputs: tuple[Tensor, ...], draws: int, seed: int, pipes: Pipes
) -> None:
    try:
        if not model.dropout(on=True):
            raise Refusal(
                "NO_DROPOUT",
                "the program has no dropout layer that can be switched on: use nn.Dropout layers, and "
                "torch.jit.script or torch.export (a trace fixes them)",
            )
        for index in range(draws):
            _draw(model, inputs, seed, index, pipes)
    finally:
        model.dropout(on=False)


def _with_weights(
    model: Model,
    inputs: tuple[Tensor, ...],
    seed: int,
    batches: list[tuple[Tensor, ...]],
    pipes: Pipes,
) -> int:
    """How many BatchNorm layers were calibrated."""
    state = model.state()
    own = {name: tensor.clone() for name, tensor in state.items()}
    index = norms = 0
    try:
        while True:
            header, received = pipes.receive()
            if header["op"] == "end":
                return norms
            _overwrite(state, own, received)
            if batches:
                norms = _calibrate(model, batches, seed)
            _draw(model, inputs, seed, index, pipes)
            index += 1
    finally:
        for name, tensor in own.items():
            state[name].copy_(tensor)
        model.restored()


def _overwrite(state: dict[str, Tensor], own: dict[str, Tensor], received: Received) -> None:
    """Copy what came over the tensors of the same names, and their own values over the others."""
    for name, dtype, shape, _ in received:
        if name not in state:
            raise Refusal("KEY_MISMATCH", f"the program has no tensor {name!r}")
        if state[name].dtype != DTYPES[dtype] or tuple(state[name].shape) != shape:
            raise Refusal(
                "SHAPE_MISMATCH",
                f"tensor {name!r} is {dtype} {shape}; the program's is {NAMES.get(state[name].dtype)} "
                f"{tuple(state[name].shape)}",
            )
    given = {tensor[0] for tensor in received}
    for name in own.keys() - given:
        state[name].copy_(own[name])
    for tensor in received:  # last: a name left out may be tied to one that came
        state[tensor[0]].copy_(made(tensor))


def _calibrate(model: Model, batches: list[tuple[Tensor, ...]], seed: int) -> int:
    """Running statistics become the mean of the batches' own, which each layer tells one batch at a time.

    Returns how many layers have such statistics; without any, no batch is run.
    """
    torch.manual_seed(_seed(seed, -1))
    try:
        running = model.norms(on=True)
        if running is None:
            raise Refusal(
                "BATCH_NORM_FIXED",
                "the program's BatchNorm layers can't be calibrated, because a trace has fixed them: use "
                "torch.jit.script or torch.export without decompositions",
            )
        if not running:
            return 0
        shares = model.read()
        sums = [[torch.zeros_like(t, dtype=torch.float64) for t in pair] for pair in running]
        for batch in batches:
            for pair in running:
                for statistic in pair:
                    statistic.zero_()
            model.norms(on=True)
            model.run(batch)
            for pair, total, share in zip(running, sums, shares, strict=True):
                for statistic, part in zip(pair, total, strict=True):
                    part += statistic.double() / share
        for pair, total in zip(running, sums, strict=True):
            for statistic, part in zip(pair, total, strict=True):
                statistic.copy_(part / len(batches))
        return len(running)
    finally:
        model.norms(on=False)


def _draw(model: Model, inputs: tuple[Tensor, ...], seed: int, index: int, pipes: Pipes) -> None:
    torch.manual_seed(_seed(seed, index))
    # Programs may write to what they are given.
    output = first_tensor(model.run(tuple(t.clone() for t in inputs)))
    if output is None:
        raise Refusal(
            "PROGRAM_FAILED", "the program answers no tensor, nor anything that starts with one"
        )
    if output.dtype not in NAMES or output.layout != torch.strided:
        raise Refusal("PROGRAM_FAILED", f"the program answers {output.dtype} in {output.layout}")
    packed = output.detach().resolve_conj().resolve_neg().cpu().contiguous()
    described = ["", NAMES[packed.dtype], list(packed.shape)]
    flat = packed.reshape(-1)
    body = flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
    pipes.send({"draw": index, "tensors": [described]}, body)


def first_tensor(answer: Any, depth: int = 0) -> Tensor | None:
    """The answer itself, or the first tensor in its tuples, lists and dicts."""
    if isinstance(answer, Tensor):
        return answer
    members: Iterable[Any] = ()
    if depth < NESTED:
        members = (
            answer.values()
            if isinstance(answer, dict)
            else answer
            if isinstance(answer, tuple | list)
            else ()
        )
    for member in members:
        found = first_tensor(member, depth + 1)
        if found is not None:
            return found
    return None


def made(received: tuple[str, str, tuple[int, ...], Any]) -> Tensor:
    """A tensor over the bytes that came."""
    _, dtype, shape, data = received
    if not data:
        return torch.empty(shape, dtype=DTYPES[dtype])
    return torch.frombuffer(data, dtype=DTYPES[dtype]).reshape(shape)


def _seed(seed: int, index: int) -> int:
    """Unrelated seeds for the draws of one request; torch's generators take 64 bits."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{index}".encode()).digest()[:7])
