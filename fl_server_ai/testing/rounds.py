"""Rounds of one strategy through files and the engine, as a worker runs them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import load_file, save_file

from fl_server_ai.aggregation import RoundFacts, Strategy, UpdateMeta
from fl_server_ai.aggregation.engine import UpdateFile, aggregate
from fl_server_ai.aggregation.flat import float_runs
from fl_server_ai.aggregation.options import parse_options
from fl_server_ai.containers import read_manifest
from fl_server_ai.containers.writing import write_canonical

Tensors = dict[str, torch.Tensor]
N = 11  # updates: what the rules with the highest demands accept by default
BLOCK = 64  # numbers; the models below have several blocks


class Broken(AssertionError):
    """A promise that every strategy makes is broken; says which, and how."""


def broken(said: str) -> NoReturn:
    """Say that a promise is."""
    raise Broken(said)


def expect(holds: object, said: str) -> None:
    """Raise `Broken` unless it holds."""
    if not holds:
        raise Broken(said)


@contextmanager
def expected(said: str) -> Iterator[None]:
    """Whatever is raised inside becomes `Broken`, with the reason."""
    try:
        yield
    except Broken:
        raise
    except Exception as error:  # whatever a strategy raises is its fault
        raise Broken(f"{said}: {type(error).__name__}: {error}") from error


def random_model(seed: int) -> Tensors:
    """Floats of two dtypes, and integers."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "h": torch.randn(17, generator=generator).bfloat16(),
        "w": torch.randn(50, 3, generator=generator),
        "count": torch.randint(0, 100, (4,), generator=generator),
    }


def masks(models: Sequence[Tensors]) -> list[Tensors]:
    """Zeros and ones in the place of the floats."""
    return [
        {name: (t > 0).to(t.dtype) if t.is_floating_point() else t for name, t in model.items()}
        for model in models
    ]


@dataclass(frozen=True)
class Result:
    """A round's files: weights and, if the strategy remembers something, its state."""

    weights: bytes
    state: bytes
    scalars: Mapping[str, Any]
    out: Path
    state_out: Path | None

    @property
    def all(self) -> bytes:
        return self.weights + self.state


@dataclass
class Rounds:
    """A strategy's class with its options, and a folder to work in."""

    kind: type[Strategy[Any]]
    folder: Path
    options: Mapping[str, Any] = field(default_factory=dict)
    _names: "count[int]" = field(default_factory=count)

    def new(self, **options: Any) -> Strategy[Any]:
        """An instance, as a worker makes one for each round."""
        return self.kind(parse_options(self.kind.Options, {**self.options, **options}))

    def write(self, model: Tensors) -> Path:
        path = self.folder / f"{next(self._names):04}"
        save_file(model, path)
        return path

    @cached_property
    def base(self) -> Path:
        """The global model; probabilities where clients send masks."""
        model = random_model(99)
        if self.kind.takes == "mask":
            model["w"], model["h"] = model["w"].sigmoid(), model["h"].sigmoid()
        return self.write(model)

    @cached_property
    def updates(self) -> list[UpdateFile]:
        """Sample sizes 1 to 4, in the order of participants."""
        models = [random_model(seed) for seed in range(N)]
        if self.kind.takes == "mask":
            models = masks(models)
        return [
            UpdateFile(self.write(model), UpdateMeta(f"{k:03}", k % 4 + 1))
            for k, model in enumerate(models)
        ]

    def alike(self, path: Path) -> list[UpdateFile]:
        """As many updates, all of this file."""
        return [UpdateFile(path, file.meta) for file in self.updates]

    def run(
        self,
        updates: Sequence[UpdateFile] | None = None,
        *,
        base: Path | None = None,
        after: Result | None = None,
        strategy: Strategy[Any] | None = None,
        number: int = 0,
        block: int = BLOCK,
        threads: int = 1,
        progress: Any = None,
        actor: str = "",
    ) -> Result:
        """One round from `base`, with the state of the round `after` which it comes; the actor is the first by name."""
        strategy = self.new() if strategy is None else strategy
        name = f"{next(self._names):04}"
        out, state = self.folder / f"{name}.out", self.folder / f"{name}.state"
        given = self.updates if updates is None else updates
        made = aggregate(
            base=base or (after.out if after else self.base),
            updates=furnished(strategy, given, self.folder, number, actor),
            out=out,
            strategy=strategy,
            state_in=after.state_out if after else None,
            state_out=state,
            block=block,
            threads=threads,
            device="cpu",
            progress=progress,
        )
        left = state if state.exists() else None
        return Result(out.read_bytes(), left.read_bytes() if left else b"", made.scalars, out, left)

    def sent(self, number: int) -> list[UpdateFile]:
        """What arrives in round `number`, from 0: other updates of other means in each round."""
        return [
            replace(file, path=self.updates[(k + number) % N].path)
            for k, file in enumerate(self.updates[number:])
        ]

    def session(self, rounds: int = 3) -> list[Result]:
        """Rounds one after the other, each with a new instance."""
        results: list[Result] = []
        for number in range(rounds):
            after = results[-1] if results else None
            results.append(self.run(self.sent(number), after=after, number=number))
        return results


def floats_of(path: Path) -> Tensors:
    """The float tensors of a file."""
    return {name: t for name, t in load_file(path).items() if t.is_floating_point()}


def furnished(
    strategy: Strategy[Any],
    updates: Sequence[UpdateFile],
    folder: Path,
    number: int = 0,
    actor: str = "",
) -> list[UpdateFile]:
    """The updates with steps and neutral extras: what the strategy wants of its clients."""
    first = min((file.meta.participant for file in updates), default="")
    strategy.facts = RoundFacts(number=number, actor=actor or first)
    wanted = [extra for extra in strategy.extras() if extra.required]
    names = [extra.name for extra in wanted if extra.per_tensor]
    numbers = {extra.name: 1.0 for extra in wanted if not extra.per_tensor}
    beside = None
    if names:
        runs = float_runs(read_manifest(updates[0].path).tensors)
        beside = folder / "beside"
        layout = [
            (f"{name}.{index}", run.beside, (run.count,))
            for name in names
            for index, run in enumerate(runs)
        ]
        sizes = {name: shape[0] * (8 if dtype == "F64" else 4) for name, dtype, shape in layout}
        beside.unlink(missing_ok=True)
        write_canonical(beside, layout, lambda name: [bytes(sizes[name])])
    return [
        replace(file, meta=replace(file.meta, num_steps=3, extras=numbers), extras=beside)
        for file in updates
    ]
