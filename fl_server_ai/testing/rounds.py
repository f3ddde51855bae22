"""Rounds of one strategy through files and the engine, as a worker runs them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import load_file, save_file

from fl_server_ai.aggregation import Extra, RoundFacts, Strategy, UpdateMeta
from fl_server_ai.aggregation.blocks import FLOATS
from fl_server_ai.aggregation.engine import UpdateFile, aggregate
from fl_server_ai.aggregation.flat import FloatRun, float_runs
from fl_server_ai.aggregation.options import parse_options
from fl_server_ai.containers import read_manifest
from fl_server_ai.containers.writing import write_canonical

Tensors = dict[str, torch.Tensor]
N = 11  # updates: what the rules with the highest demands accept by default
PARTS = (1.0, 0.25, 0.75, 0.5)  # of what an extra may be
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
    device: str = "cpu"
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
        """Sample sizes 1 to 4 and 1 to 11 steps, in the order of participants."""
        models = [random_model(seed) for seed in range(N)]
        if self.kind.takes == "mask":
            models = masks(models)
        return [
            UpdateFile(self.write(model), UpdateMeta(f"{k:03}", k % 4 + 1, num_steps=k + 1))
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
        neutral: bool = False,
    ) -> Result:
        """One round from `base`, with the state of the round `after` which it comes; the actor is the first by name.

        What lies beside the updates is `furnished`.
        """
        strategy = self.new() if strategy is None else strategy
        name = f"{next(self._names):04}"
        out, state = self.folder / f"{name}.out", self.folder / f"{name}.state"
        given = self.updates if updates is None else updates
        made = aggregate(
            base=base or (after.out if after else self.base),
            updates=furnished(strategy, given, self.folder, number, actor, neutral=neutral),
            out=out,
            strategy=strategy,
            state_in=after.state_out if after else None,
            state_out=state,
            block=block,
            threads=threads,
            device=self.device,
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
    *,
    neutral: bool = False,
) -> list[UpdateFile]:
    """The updates with what the strategy wants beside them: other steps and extras for each, in each round.

    What an update gets depends on the `num_steps` that it has, or else on its place by name, so it keeps it
    under another name. `neutral` ones are alike: three steps, extras of one, vectors of zeros.
    """
    ranks = sorted(file.meta.participant for file in updates)
    strategy.facts = RoundFacts(number=number, actor=actor or (ranks[0] if ranks else ""))
    names = [extra.name for extra in strategy.extras() if extra.per_tensor]
    found = []
    for file in updates:
        steps = file.meta.num_steps or ranks.index(file.meta.participant) + 1
        meta = (
            _neutral(strategy, file.meta) if neutral else _told(strategy, file.meta, steps, number)
        )
        beside = None
        if names:
            runs = float_runs(read_manifest(file.path).tensors)
            beside = _vectors(strategy, runs, folder, None if neutral else 100 * number + steps)
        found.append(replace(file, meta=meta, extras=beside))
    return found


def _neutral(strategy: Strategy[Any], meta: UpdateMeta) -> UpdateMeta:
    wanted = [extra for extra in strategy.extras() if extra.required and not extra.per_tensor]
    return replace(meta, num_steps=3, extras={extra.name: 1.0 for extra in wanted})


def _told(strategy: Strategy[Any], meta: UpdateMeta, steps: int, number: int) -> UpdateMeta:
    """What the strategy admits of: all extras, those that are required, or neutral ones."""
    numbers = [extra for extra in strategy.extras() if not extra.per_tensor]
    said = {
        extra.name: _within(extra, PARTS[(steps + number + 2 * place) % len(PARTS)])
        for place, extra in enumerate(numbers)
    }
    required = {extra.name: said[extra.name] for extra in numbers if extra.required}
    for extras in (said if steps % 2 else required, required):
        told = replace(meta, num_steps=steps, extras=extras)
        if strategy.admit(told) is None:
            return told
    return _neutral(strategy, meta)


def _within(extra: Extra, part: float) -> float:
    """A number that the extra may have: in the part from 0 to 1 if it can be, or else next to that."""
    least, most = extra.limits
    low = min(max(0.0, least), most)
    return low + part * (min(most, low + 1) - low) if low < most else least


def _vectors(
    strategy: Strategy[Any], runs: Sequence[FloatRun], folder: Path, seed: int | None
) -> Path:
    """A file of the extras that are vectors: zeros without a seed, else small numbers of both signs."""
    vectors = [
        (f"{extra.name}.{index}", run, extra.limits, 10 * place + index)
        for place, extra in enumerate(extra for extra in strategy.extras() if extra.per_tensor)
        for index, run in enumerate(runs)
    ]
    layout = [(name, run.beside, (run.count,)) for name, run, _, _ in vectors]
    said = repr((layout, [limits for _, _, limits, _ in vectors]))
    path = folder / f"beside.{sha256(said.encode()).hexdigest()[:12]}.{seed}"
    if not path.exists():  # the same name, the same bytes
        blocks = {}
        for name, run, limits, place in vectors:
            vector = torch.zeros(run.count, dtype=torch.float64)
            if seed is not None:
                generator = torch.Generator().manual_seed(1000 * seed + place)
                vector.normal_(0, 0.1, generator=generator).clamp_(*limits)
            blocks[name] = vector.to(FLOATS[run.beside]).numpy().tobytes()
        write_canonical(path, layout, lambda name: [blocks[name]])
    return path
