"""The kit can fail: for each check, strategies that break its promise, and what it says of them."""

import itertools
import random
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from fl_server_ai.aggregation import STRATEGIES, Extra, Refused, Strategy
from fl_server_ai.testing import CHECKS, Broken, Rounds, conformance, furnished
from fl_server_ai.testing import __main__ as command
from fl_server_ai.testing.rounds import N
from fl_server_core.exceptions import AggregationException


@dataclass(frozen=True)
class Share:
    """One good option."""

    share: float = field(default=0.5, metadata={"ge": 0.0, "le": 1.0, "doc": "How far to go."})


class Good(Strategy[Share]):
    """Goes part of the way, with momentum: everything is done as it should be."""

    Options = Share
    paper = "1602.05629"
    state_blocks = ("m",)
    by_number = True
    rounds = 0

    def check(self, meta: Any, tensors: Any) -> Any:
        return {name: tensor.clone() for name, tensor in tensors.items()}

    def weights(self, metas: Any, gram: Any) -> Any:
        self.rounds += 1
        return [1.0] * len(metas)

    def update(self, x: Any, y: Any, state: Any) -> Any:
        state["m"] = state["m"] * 0.5 + (x - y)
        return x - state["m"] * self.options.share

    def state_dict(self) -> dict[str, Any]:
        return {"rounds": self.rounds}

    def load_state_dict(self, state: Any) -> None:
        self.rounds = state["rounds"]


class BadPaper(Good):
    """Nobody can find what it comes from."""

    paper = "a talk"


class NoPaper(Good):
    """A rule of one's own."""

    paper = ""


@dataclass
class Thawed:
    share: float = field(default=0.5, metadata={"doc": "x"})


class ThawedOptions(Good):
    """Its options can be changed."""

    Options = Thawed


@dataclass(frozen=True)
class Required:
    share: float = field(metadata={"doc": "x"})


class NoDefault(Good):
    """Its option has no default."""

    Options = Required


@dataclass(frozen=True)
class Silent:
    share: float = 0.5


class NoTexts(Good):
    """Its option says nothing."""

    Options = Silent


class BadExtra(Good):
    """Its extra has no namespace."""

    def extras(self) -> tuple[Extra, ...]:
        return (Extra("loss", "x", required=False),)


class ReservedExtra(Good):
    """Its extra is in a namespace that is the server's."""

    def extras(self) -> tuple[Extra, ...]:
        return (Extra("fl.loss", "x", required=False),)


class ReservedWithOptions(Good):
    """With some options only."""

    def extras(self) -> tuple[Extra, ...]:
        return (Extra("enc.loss", "x", required=False),) if self.options.share == 1 else ()


@dataclass(frozen=True)
class Picky:
    share: float = field(default=0.5, metadata={"ge": 0.0, "le": 1.0, "doc": "x"})

    def __post_init__(self) -> None:
        if self.share == 1:
            raise ValueError("not 1")


class CrashingOptions(Good):
    """A value that its schema allows crashes it."""

    Options = Picky


class TakesAnything(Good):
    """What it was asked for is put right in silence."""

    def __init__(self, options: Any = None) -> None:
        super().__init__(Share(int(options.share) if options else 0))


class CheckWrites(Good):
    """Changes what it is given."""

    def check(self, meta: Any, tensors: Any) -> Any:
        tensors["w"].mul_(0.5)


class CheckRaises(Good):
    """Raises where it should refuse."""

    def check(self, meta: Any, tensors: Any) -> Any:
        raise ValueError("too large")


class CheckWithoutReason(Good):
    """Refuses, and nobody knows why."""

    def check(self, meta: Any, tensors: Any) -> Any:
        return Refused("")


class CheckReshapes(Good):
    """Gives back something else."""

    def check(self, meta: Any, tensors: Any) -> Any:
        return {name: tensor.flatten() for name, tensor in tensors.items()}


class CheckDivides(Good):
    """Divides by the norm, which may be zero."""

    def check(self, meta: Any, tensors: Any) -> Any:
        return {
            name: tensor / tensor.norm() if tensor.is_floating_point() else tensor
            for name, tensor in tensors.items()
        }


class OnTheClass(Good):
    """Remembers on the class."""

    seen: dict[str, int] = {}

    def weights(self, metas: Any, gram: Any) -> Any:
        self.seen |= {meta.participant: 1 for meta in metas}
        return [1.0] * len(metas)


class CountsBlocks(Good):
    """Takes blocks for rounds."""

    def update(self, x: Any, y: Any, state: Any) -> Any:
        self.rounds += 1
        return x - (x - y) * self.options.share / self.rounds


class WholeBlock(Good):
    """Looks at other columns of the block."""

    def reduce(self, rows: Any) -> Any:
        return rows.double().mean(dim=0) * rows.double().norm()


class FirstCome(Good):
    """The number of threads shows: what one block leaves, the next one uses."""

    last = 0.0

    def update(self, x: Any, y: Any, state: Any) -> Any:
        made = y + self.last * 1e-3
        self.last = float(y[-1])
        return made


class SizesMatter(Good):
    """Sample sizes themselves count, not their proportions."""

    def weights(self, metas: Any, gram: Any) -> Any:
        return [meta.num_examples**0.5 + 1 for meta in metas]


class HalfSums(Good):
    """Sums in the dtype that comes."""

    def reduce(self, rows: Any) -> Any:
        return rows.sum(dim=0) / len(rows)

    def update(self, x: Any, y: Any, state: Any) -> Any:
        return y


class OneTooFew(Good):
    """Forgets an update."""

    def weights(self, metas: Any, gram: Any) -> Any:
        return [1.0] * (len(metas) - 1)


class Negative(Good):
    """Weights below zero."""

    def weights(self, metas: Any, gram: Any) -> Any:
        return [-1.0, *[1.0] * (len(metas) - 1)]


class Dice(Good):
    """Random."""

    def weights(self, metas: Any, gram: Any) -> Any:
        return [random.random() + 0.1 for _ in metas]  # noqa: S311


class WritesGram(Good):
    """Changes what others may still need."""

    needs_gram = True

    def weights(self, metas: Any, gram: Any) -> Any:
        gram.fill_diagonal_(0)
        return [1.0] * len(metas)


class Drifts(Good):
    """Moves where nobody did."""

    def update(self, x: Any, y: Any, state: Any) -> Any:
        return y + 1e-3


class ByPlace(Good):
    """Who is first by name counts most."""

    def weights(self, metas: Any, gram: Any) -> Any:
        return [1 / (place + 1) for place in range(len(metas))]


class AsksTheFirst(Good):
    """What the first by name reports counts for all; only reports that differ show it."""

    def extras(self) -> tuple[Extra, ...]:
        return (Extra("own.loss", "a loss"),)

    def weights(self, metas: Any, gram: Any) -> Any:
        return [metas[0].extras["own.loss"] + (meta.num_steps or 0) for meta in metas]


class NeedsThree(Good):
    """Crashes with two."""

    def reduce(self, rows: Any) -> Any:
        return rows.double().sort(dim=0).values[2]


class RefusesInSilence(Good):
    """Needs more than it says."""

    def weights(self, metas: Any, gram: Any) -> Any:
        if len(metas) < 4:
            raise AggregationException("four, please")
        return [1.0] * len(metas)


class WritesInput(Good):
    """Takes what was read for its own file, here as an attack on the disk."""

    folder: Path

    def weights(self, metas: Any, gram: Any) -> Any:
        path = sorted(self.folder.glob("????"))[1]
        path.write_bytes(path.read_bytes()[:-1] + b"\7")
        return [1.0] * len(metas)


class Zeroes(Good):
    """Hides NaN, and with it that a participant is broken."""

    def reduce(self, rows: Any) -> Any:
        if not rows.isfinite().all():
            raise ZeroDivisionError
        return rows.double().mean(dim=0)


class DividesByOption(Good):
    """An allowed value is one too many."""

    def update(self, x: Any, y: Any, state: Any) -> Any:
        return x - (x - y) * (0.5 / self.options.share)


class Forgets(Good):
    """Keeps a number on the instance only."""

    seen = 0

    def update(self, x: Any, y: Any, state: Any) -> Any:
        return x + (y - x) / (1 + self.seen)

    def weights(self, metas: Any, gram: Any) -> Any:
        self.seen = self.seen + 1
        return [1.0] * len(metas)


CALLS = itertools.count(1)


class Elsewhere(Good):
    """Counts in a variable of its module."""

    def update(self, x: Any, y: Any, state: Any) -> Any:
        return x + (y - x) / next(CALLS)


class HalfRestored(Good):
    """Stores what it does not read."""

    def load_state_dict(self, state: Any) -> None:
        self.rounds = 0


class NotJson(Good):
    """Stores what JSON has no word for."""

    def state_dict(self) -> dict[str, Any]:
        return {"worst": float("inf")}

    def load_state_dict(self, state: Any) -> None:
        pass


class Attempts(Good):
    """Counts attempts outside; a second attempt is another round for it."""

    tries = itertools.count(1)

    def weights(self, metas: Any, gram: Any) -> Any:
        self.step = 1 / next(self.tries)
        return [1.0] * len(metas)

    def update(self, x: Any, y: Any, state: Any) -> Any:
        return x + (y - x) * self.step


class Hoards(Good):
    """Keeps every block."""

    def update(self, x: Any, y: Any, state: Any) -> Any:
        self.kept = [*getattr(self, "kept", []), x]
        return y


class Pairs(Good):
    """All pairs of updates, for each coordinate."""

    def reduce(self, rows: Any) -> Any:
        apart = (rows[:, None].double() - rows[None].double()).abs()
        return rows.double()[0] + apart.sum(dim=(0, 1)) * 0


class TrimsTwo(Strategy[Any]):
    """Two at each end: of a tensor that four or fewer have sent, nothing is left."""

    by_number = True

    def fewest(self) -> int:
        return 5

    def reduce(self, rows: Any) -> Any:
        return rows.double().sort(dim=0).values[2:-2].mean(dim=0)


class DividesByAll(Strategy[Any]):
    """By how many updates there are, not by how many have sent the tensor."""

    by_number = True

    def weights(self, metas: Any, gram: Any) -> Any:
        self.n = len(metas)
        return [1.0] * self.n

    def reduce(self, rows: Any) -> Any:
        return rows.double().sum(dim=0) / self.n


class DropsWhatStays(Good):
    """Has nothing to remember of a block in which nobody sent some of the numbers."""

    def update(self, x: Any, y: Any, state: Any) -> Any:
        stays = x == y
        if stays.any() and not stays.all():
            state.clear()
        return y


BREAKS: dict[str, list[type[Strategy[Any]]]] = {
    "description": [BadPaper, ThawedOptions, NoDefault, NoTexts, BadExtra, ReservedExtra],
    "bad options": [CrashingOptions, TakesAnything],
    "check hook": [CheckWrites, CheckRaises, CheckWithoutReason, CheckReshapes, CheckDivides],
    "instances": [OnTheClass],
    "permutation": [CountsBlocks, WholeBlock, FirstCome, Dice, ByPlace, AsksTheFirst],
    "scale": [SizesMatter, HalfSums],
    "weights": [OneTooFew, Negative, Dice, WritesGram, Drifts],
    "few updates": [NeedsThree, RefusesInSilence],
    "inputs": [WritesInput],
    "broken numbers": [Zeroes],
    "option limits": [DividesByOption, CrashingOptions],
    "state": [Forgets, Elsewhere, HalfRestored, NotJson],
    "resume": [Attempts, Dice],
    "memory": [Hoards, Pairs],
    "partial updates": [TrimsTwo, DividesByAll, DropsWhatStays],
}
PAIRS = [(check, kind) for check, kinds in BREAKS.items() for kind in kinds]


@pytest.mark.parametrize(("check", "kind"), PAIRS, ids=lambda part: getattr(part, "__name__", part))
def test_a_broken_promise_is_found(check: str, kind: type[Strategy[Any]], tmp_path: Path) -> None:
    if kind is WritesInput:
        WritesInput.folder = tmp_path

    with pytest.raises(Broken) as found:
        conformance(kind, check, tmp_path)

    assert len(str(found.value)) > 20


@pytest.mark.parametrize("check", CHECKS)
def test_a_good_strategy_passes(check: str, tmp_path: Path) -> None:
    conformance(Good, check, tmp_path)


def test_updates_differ_in_all_that_a_strategy_may_weigh(tmp_path: Path) -> None:
    def rounds(name: str, **options: Any) -> Rounds:
        folder = tmp_path / name
        folder.mkdir()
        return Rounds(STRATEGIES[name], folder, options)

    variates = load_file(rounds("SCAFFOLD").run().state_out)
    shares = rounds("FedDGGA").session()[-1].scalars["shares"]
    nova, penalties = rounds("FedNova"), rounds("ICEADMM", rho=1)
    told = furnished(nova.new(), nova.updates, nova.folder)
    rhos = furnished(penalties.new(), penalties.updates, penalties.folder)

    assert variates["c.0"].min() < 0 < variates["c.0"].max()
    assert len(set(shares.values())) > 2
    assert len({file.meta.num_steps for file in told}) == N
    assert len({file.meta.extras.get("admm.rho") for file in rhos}) > 2


def test_each_check_is_known_to_fail() -> None:
    assert set(BREAKS) == set(CHECKS)


def test_options_are_those_that_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(Broken, match="ZeroDivisionError"):
        conformance(DividesByOption, "permutation", tmp_path, {"share": 0})
    conformance(ReservedWithOptions, "description", tmp_path)
    with pytest.raises(Broken, match="'enc', which is reserved"):
        conformance(ReservedWithOptions, "description", tmp_path, {"share": 1})


def test_the_table_says_what_is_broken_and_fails() -> None:
    root = Path(__file__).parents[2]

    done = subprocess.run(
        [sys.executable, "-m", "fl_server_ai.testing", "tests.ai.test_conformance_kit:BadPaper"],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 1, done.stderr
    assert "description     BROKEN  paper is 'a talk'; give an arXiv id" in done.stdout
    assert "BadPaper: 14 of 15 promises kept" in done.stdout


def test_a_rule_of_ones_own_needs_no_paper_and_a_note_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    conformance(NoPaper, "description", tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    monkeypatch.setattr(command, "CHECKS", ["description"])
    monkeypatch.setattr("sys.argv", ["kit", f"{__name__}:NoPaper"])

    failed = command.main()

    assert failed == 0
    assert "note: no `paper`" in capsys.readouterr().out


def test_a_module_that_is_not_here_is_said_with_the_folder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("sys.path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["kit", "my_own_half:MyOwnHalf"])

    with pytest.raises(SystemExit):
        command.main()

    assert f"looked in {tmp_path}" in capsys.readouterr().err
