"""The promise of rules that combine each number for itself: updates may leave some out, in every way they are taken."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from fl_server_ai.aggregation.engine import UpdateFile
from fl_server_ai.aggregation.flat import float_runs
from fl_server_ai.aggregation.step import overrides
from fl_server_ai.containers import read_manifest
from fl_server_ai.testing.rounds import N, Rounds, Tensors, expect, expected, floats_of

TENSORS = (
    "tensors that some updates leave out, as `by_number` permits (to `reduce` come the rows of those who "
    "sent one: fewer than `fewest` says, perhaps a single one)"
)
NUMBERS = "numbers that some updates leave out, as `by_number` permits to means"


def partial(rounds: Rounds) -> None:
    """With `by_number` any number of updates, down to one, may have sent a tensor; of a mean, also a single number."""
    if not rounds.kind.by_number or rounds.kind.takes != "weights":
        return
    base = rounds.write(_model(99))
    whole = [
        replace(file, path=rounds.write(_model(seed))) for seed, file in enumerate(rounds.updates)
    ]
    still = [replace(file, path=base) for file in whole]
    ways = [(TENSORS, _without_tensors)]
    if not overrides(rounds.new(), "reduce"):
        ways.append((NUMBERS, _without_numbers))
    for said, without in ways:
        with expected(said):
            first = rounds.run(without(rounds, whole), base=base)
            second = rounds.run(without(rounds, whole), after=first, number=1)
            unmoved = rounds.run(without(rounds, still), base=base, neutral=True)
        for made in (first, second):
            for name, tensor in floats_of(made.out).items():
                expect(torch.isfinite(tensor).all(), f"{said}: NaN or infinity in {name!r}")
        expect(
            unmoved.weights == base.read_bytes(),
            f"{said}: updates that did not move change the model. Divide by those who sent a number, not by all",
        )


def _model(seed: int) -> Tensors:
    """Of two dtypes, a tensor for each number of those who send it, from none to all."""
    generator = torch.Generator().manual_seed(seed)
    model = {}
    for senders in range(N + 1):
        model[f"w{senders:02}"] = torch.randn(5, generator=generator)
        model[f"h{senders:02}"] = torch.randn(3, generator=generator).bfloat16()
    return model


def _sends(place: int, senders: int) -> bool:
    """Whether an update is one of so many: not always of the same."""
    return (place + senders) % N < senders


def _without_tensors(rounds: Rounds, updates: Sequence[UpdateFile]) -> list[UpdateFile]:
    names = _model(0)
    return [
        replace(file, tensors=frozenset(name for name in names if _sends(place, int(name[1:]))))
        for place, file in enumerate(updates)
    ]


def _without_numbers(rounds: Rounds, updates: Sequence[UpdateFile]) -> list[UpdateFile]:
    runs = float_runs(read_manifest(updates[0].path).tensors)
    return [
        replace(file, mask=rounds.write(_mask(place, [run.count for run in runs])))
        for place, file in enumerate(updates)
    ]


def _mask(place: int, counts: Sequence[int]) -> Tensors:
    """Ones where the update has sent a number; of each number of senders there are some."""
    return {
        f"mask.{index}": torch.tensor(
            [_sends(place, at % (N + 1)) for at in range(count)], dtype=torch.uint8
        )
        for index, count in enumerate(counts)
    }


CHECKS: dict[str, Callable[[Rounds], None]] = {"partial updates": partial}
