"""Promises that only rounds can show: order, scale, weights, state, resume, memory and what comes out."""

import gc
import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from safetensors.torch import load_file

from fl_server_ai.aggregation import Strategy
from fl_server_ai.aggregation.engine import UpdateFile
from fl_server_ai.aggregation.options import schema
from fl_server_ai.aggregation.step import overrides
from fl_server_ai.testing.memory import Peak
from fl_server_ai.testing.rounds import (
    N,
    Result,
    Rounds,
    broken,
    expect,
    expected,
    floats_of,
)
from fl_server_core.exceptions import AggregationException

SIZE = 4096  # numbers of a block whose memory is counted


def permutation(rounds: Rounds) -> None:
    """The order of arrival, block sizes and threads never show, in no byte of weights or state; nor do names."""
    with expected("a plain round"):
        wanted = rounds.run().all
        given = rounds.updates
        expect(rounds.run(given[::-1]).all == wanted, "the result depends on the order of arrival")
        expect(
            rounds.run(given[5:] + given[:5], block=7, threads=3).all == wanted,
            "the result depends on block sizes or threads: `reduce` and `update` must treat each "
            "column for itself, and change nothing on `self`",
        )
        expect(rounds.run(block=1 << 17).all == wanted, "the result depends on the size of blocks")
    _renamed(rounds)


def _renamed(rounds: Rounds) -> None:
    """Other names, in another order, for the same participants: sums differ in their last bits at most."""
    names = {file.meta.participant: f"{k * 4 % N:03}" for k, file in enumerate(rounds.updates, 1)}
    moved = [
        replace(file, meta=replace(file.meta, participant=names[file.meta.participant]))
        for file in rounds.updates
    ]
    actor = names[min(names)]
    with expected("other names of the same participants"):
        wanted = floats_of(rounds.run().out)
        found = floats_of(rounds.run(moved, actor=actor).out)
    for name, tensor in found.items():
        close = 2e-2 if tensor.dtype == torch.bfloat16 else 1e-3
        expect(
            torch.allclose(tensor, wanted[name], rtol=close, atol=close),
            "the result depends on what the participants are called: `metas` and `rows` are in the order of their "
            "names, and a place in it must not count",
        )


def scale(rounds: Rounds) -> None:
    """Only proportions of sample sizes count; very large ones, and large half floats, stay finite."""
    with expected("sample sizes times 4"):
        more = [resized(file, file.meta.num_examples * 4) for file in rounds.updates]
        expect(
            rounds.run(more).weights == rounds.run().weights,
            "four times all sample sizes make another model",
        )
    huge = [resized(file, 2**31 - 1 - k) for k, file in enumerate(rounds.updates)]
    with expected("sample sizes near 2^31"):
        _finite(rounds.run(huge), "sample sizes near 2^31")
    if rounds.kind.takes != "weights":
        return
    top = rounds.write({"w": torch.full((100,), 60_000.0, dtype=torch.float16)})
    many = [resized(file, 60_000) for file in rounds.alike(top)]
    with expected("half floats of 60,000 with 60,000 samples each"):
        out = rounds.run(many, base=top, neutral=True).out
    expect(
        floats_of(out)["w"].eq(60_000).all(), "half floats of 60,000 overflow: sum in a wider dtype"
    )


def weights(rounds: Rounds) -> None:
    """`weights` gives one finite number from 0 for each update, not all zero, and changes nothing else."""
    seen: list[tuple[Any, Any, Any]] = []

    def look(metas: Any, gram: Any) -> Any:
        before = None if gram is None else gram.clone()
        given = given_weights(metas, gram)
        expect(before is None or torch.equal(before, gram), "`weights` changed the Gram matrix")
        seen.append((list(metas), gram, list(given)))
        return given

    strategy = rounds.new()
    given_weights = strategy.weights
    strategy.weights = look  # type: ignore[method-assign]
    with expected("`weights` of a plain round"):
        rounds.run(strategy=strategy)
    metas, gram, given = seen[0]
    expect(len(given) == N, f"{len(given)} weights for {N} updates")
    again = rounds.new()
    again.facts = strategy.facts
    with expected("`weights` of a plain round, in another instance"):
        same = list(again.weights(metas, gram)) == given
    expect(same, "another instance gives the same updates other weights: is something random?")
    if rounds.kind.takes == "weights":
        _unmoved(rounds)


def _unmoved(rounds: Rounds) -> None:
    with expected("clients that did not move"):
        still = rounds.run(rounds.alike(rounds.base), neutral=True)
    expect(
        still.weights == rounds.base.read_bytes(),
        "clients that did not move change the model: is a weight lost, or not divided by the sum?",
    )


def few(rounds: Rounds) -> None:
    """A round of one to four updates works, or is refused with a reason; it never crashes."""
    for n in (1, 2, 3, 4):
        try:
            made = rounds.run(rounds.updates[:n])
        except AggregationException as error:
            expect(str(error).strip(), f"{n} updates were refused without a reason")
            least = rounds.new().fewest()
            expect(n < least, f"{n} updates were refused, though `fewest` says {least}: {error}")
        except Exception as error:  # noqa: BLE001 - any crash is what this looks for
            said = f"a round of {n} raised {type(error).__name__}: {error}"
            broken(f"{said}; `fewest` and `assumes` say how many it needs")
        else:
            _finite(made, f"{n} updates")


def inputs(rounds: Rounds) -> None:
    """Files are read, never written, and every tensor comes out in its own dtype and shape."""
    files = [rounds.base, *(file.path for file in rounds.updates)]
    before = [path.read_bytes() for path in files]
    with expected("a plain round"):
        made = rounds.run()
    expect([path.read_bytes() for path in files] == before, "a round wrote into its input")
    sent = load_file(rounds.base)
    for name, tensor in load_file(made.out).items():
        fits = tensor.shape == sent[name].shape and tensor.dtype == sent[name].dtype
        expect(fits, f"{name!r} came out as {tensor.dtype} {list(tensor.shape)}")
    _finite(made, "a plain round")


def broken_numbers(rounds: Rounds) -> None:
    """A NaN or infinity never ends up in the model: the rule leaves it out, or the round is refused."""
    if rounds.kind.takes != "weights":
        return
    base = rounds.write({"w": torch.zeros(5)})
    good = [rounds.write({"w": torch.full((5,), 1 + k / 100)}) for k in range(N)]
    good[3] = rounds.write({"w": torch.tensor([1.0, torch.nan, torch.inf, 1.0, 1.0])})
    updates = [replace(file, path=path) for file, path in zip(rounds.updates, good, strict=True)]
    try:
        made = rounds.run(updates, base=base)
    except AggregationException as error:
        expect("003" in str(error), f"the reason does not name the participant: {error}")
    except Exception as error:  # noqa: BLE001 - any crash is what this looks for
        broken(f"a NaN in an update raised {type(error).__name__}: {error}")
    else:
        _finite(made, "a NaN in one update")


def state(rounds: Rounds) -> None:
    """All that is remembered is in `state_dict` and `state_blocks`: JSON, finite, restored as it was."""
    unknown = set(rounds.kind.population_means) - set(rounds.kind.state_blocks)
    expect(not unknown, f"population_means names {', '.join(sorted(unknown))}: no state block")
    with expected("three rounds"):
        results = rounds.session()
        again = rounds.session()
    for one, other in zip(results, again, strict=True):
        expect(
            one.all == other.all,
            "the same three rounds once more came to other bytes: something is kept outside of "
            "`state_dict` and `state_blocks`, or is random",
        )
    carried = rounds.new()
    after: Result | None = None
    for number, wanted in enumerate(results):
        with expected("rounds with one instance"):
            after = rounds.run(rounds.sent(number), after=after, strategy=carried, number=number)
        expect(
            after.all == wanted.all,
            f"round {number + 1} with the instance of the round before is another than with a new "
            "one: what it keeps on `self` must be in `state_dict`",
        )
    with expected("state_dict as JSON"):
        text = json.dumps(results[-1].scalars, allow_nan=False)
        restored = rounds.new()
        if results[-1].scalars:
            restored.load_state_dict(json.loads(text))
    expect(
        json.loads(json.dumps(restored.state_dict())) == json.loads(text),
        "load_state_dict does not restore what state_dict gave",
    )
    if (left := results[-1].state_out) is not None:
        for name, tensor in load_file(left).items():
            expect(torch.isfinite(tensor).all(), f"the state block {name!r} is not finite")


def resume(rounds: Rounds) -> None:
    """A round that dies in the middle and is done again comes to the same bytes."""

    class Killed(BaseException):
        pass

    def die(done: int, total: int) -> None:
        raise Killed

    with expected("two rounds"):
        first, second = rounds.session(2)
    try:
        with expected("a round that is killed"):
            rounds.run(rounds.sent(1), after=first, number=1, progress=die)
    except Killed:
        pass
    with expected("the second attempt"):
        again = rounds.run(rounds.sent(1), after=first, number=1)
    expect(again.all == second.all, "the second attempt at a round came to other bytes")


def memory(rounds: Rounds) -> None:
    """Blocks are worked on and let go: nothing of them is kept, and no copy of all of them many times."""
    strategy = rounds.new()
    with expected("a plain round"):
        rounds.run(strategy=strategy)
    if overrides(strategy, "reduce"):
        for dtype in (torch.float32, torch.bfloat16):
            _let_go(strategy, "reduce", N * SIZE, [(_random(N, SIZE) - 0.5).to(dtype)])
    if overrides(strategy, "update"):
        _let_go(strategy, "update", SIZE, _block(strategy))
    held = [name for name, value in vars(strategy).items() if isinstance(value, torch.Tensor)]
    expect(not held, f"after a round it keeps tensors in {', '.join(held)}")


def _random(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _block(strategy: Strategy[Any]) -> list[Any]:
    start = strategy.initial_state()
    state = {
        name: torch.full((SIZE,), start.get(name, 0.0), dtype=torch.float64)
        for name in strategy.state_blocks
    }
    for extra in strategy.extras():
        if extra.per_tensor:
            state[extra.name] = _random(SIZE) / 8 - 0.0625
    return [_random(SIZE) - 0.5, _random(SIZE) ** 2 - 0.5, state]


def _let_go(strategy: Strategy[Any], method: str, numbers: int, given: list[Any]) -> None:
    """Call `method` on a block and see what is left of it, and how much was taken meanwhile."""
    tensors = [one for one in given if isinstance(one, torch.Tensor)]
    shape = tensors[0].shape[-1:]
    dead = [weakref.ref(tensor) for tensor in tensors]
    del tensors
    peak = Peak()
    with peak, expected(f"`{method}` on a block"):
        made = getattr(strategy, method)(*given)
    expect(made.shape == shape, f"`{method}` made {list(made.shape)} of a block of {list(shape)}")
    given.clear()
    del made
    if any(ref() is not None for ref in dead):
        gc.collect()  # unless only a cycle holds them
    expect(all(ref() is None for ref in dead), f"`{method}` keeps the blocks that it is given")
    most = 12 * 8 * numbers + (1 << 20)
    expect(
        peak.bytes <= most,
        f"`{method}` takes {peak.bytes:,} bytes for a block of {numbers:,} numbers; {most:,} is "
        "plenty, and must not grow with the square of the updates",
    )


def resized(file: UpdateFile, size: int) -> UpdateFile:
    """The update with another sample size."""
    return replace(file, meta=replace(file.meta, num_examples=size))


def _finite(made: Result, after: str) -> None:
    for name, tensor in floats_of(made.out).items():
        expect(torch.isfinite(tensor).all(), f"{after}: NaN or infinity in {name!r}")


def limits(rounds: Rounds) -> None:
    """Every value that the schema allows works, or is refused with a reason: its bounds, and each choice."""
    for name, entry in schema(rounds.kind.Options)["properties"].items():
        values = [entry[key] for key in ("minimum", "maximum") if key in entry]
        values += [value for value in entry.get("enum", ()) if value != entry.get("default")]
        values += [True, False] if entry["type"] == "boolean" else []
        for value in values:
            try:
                made = rounds.run(strategy=rounds.new(**{name: value}))
            except AggregationException as error:
                expect(str(error).strip(), f"{name} = {value!r} was refused without a reason")
            except Exception as error:  # noqa: BLE001 - any crash is what this looks for
                broken(
                    f"{name} = {value!r} raised {type(error).__name__}: {error}; narrow the option, or "
                    "raise AggregationException",
                )
            else:
                _finite(made, f"{name} = {value!r}")


CHECKS: dict[str, Callable[[Rounds], None]] = {
    "permutation": permutation,
    "scale": scale,
    "weights": weights,
    "few updates": few,
    "inputs": inputs,
    "broken numbers": broken_numbers,
    "option limits": limits,
    "state": state,
    "resume": resume,
    "memory": memory,
}
