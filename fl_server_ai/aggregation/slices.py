"""One aggregation shared by several workers: each makes a slice of the columns, and one joins them.

Every slice opens the same files and comes to the same weights; which numbers it writes depends on nothing but its
number and how many there are. So the joined files are those that `engine.aggregate` makes, byte for byte.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fl_server_ai.aggregation.blocks import CHUNK, Draft, Layout, Target
from fl_server_ai.aggregation.combination import Combination, Inputs, Survey
from fl_server_ai.aggregation.device import single_threaded_torch, thread_count
from fl_server_ai.aggregation.engine import Aggregated, with_device
from fl_server_ai.aggregation.gram import STRIPES
from fl_server_ai.aggregation.step import Span
from fl_server_ai.aggregation.strategy import Strategy
from fl_server_ai.containers import read_manifest
from fl_server_ai.containers.writing import write_canonical
from fl_server_core.exceptions import AggregationException


class SliceChanged(AggregationException):
    """A slice's file is not the one that was made, or was made of other weights. It can be made again."""

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(f"slice {index} {reason}")
        self.index = index


@dataclass(frozen=True)
class Sliced:
    """A file with a slice of the result. `recipe` is alike for all slices that belong together."""

    digest: str
    size: int
    recipe: str
    warnings: list[str]


@dataclass(frozen=True)
class SliceFile:
    """What a worker has made: where it lies, and what it said of it."""

    path: Path
    digest: str
    recipe: str


def survey_shares(strategy: Strategy[object], most: int) -> int:
    """Into how many shares the pass before the weighing is cut; 0 if there is none."""
    if strategy.needs_gram:
        return min(most, STRIPES)
    return most if strategy.needs_largest else 0


def write_survey(
    inputs: Inputs, *, index: int, of: int, out: Path, device: str, threads: int | None = None
) -> Sliced:
    """Write what share `index` of `of` finds out about the updates: a new file, synced."""

    def run(on: torch.device) -> Survey:
        with ExitStack() as stack:
            round = Combination(stack, inputs)
            found = round.survey(on, thread_count(threads), index, of)
            round.assert_unchanged()
            return found

    found, warnings = with_device(device, inputs.strategy, run)
    arrays = {f"gram.{stripe}": part.numpy() for stripe, part in found.gram.items()}
    if found.largest:
        arrays["largest"] = np.array(found.largest)
    digest = write_canonical(
        out,
        [(name, "F64", array.shape) for name, array in arrays.items()],
        lambda name: [np.ascontiguousarray(arrays[name], "<f8").tobytes()],
    )
    return Sliced(digest, out.stat().st_size, "", warnings)


def read_survey(paths: Iterable[Path]) -> Survey:
    """The whole of what the shares found."""
    gram, largest = {}, []
    for path in paths:
        for info in read_manifest(path).tensors:
            flat = np.fromfile(path, "<f8", math.prod(info.shape), offset=info.offset)
            if info.name == "largest":
                largest.append(flat.tolist())
            else:
                stripe = int(info.name.partition(".")[2])
                gram[stripe] = torch.from_numpy(flat.reshape(info.shape))
    return Survey.joined([Survey(gram), *(Survey({}, one) for one in largest)])


def write_slice(
    inputs: Inputs,
    survey: Survey,
    *,
    index: int,
    of: int,
    out: Path,
    device: str,
    threads: int | None = None,
) -> Sliced:
    """Write slice `index` of `of`: its columns of the weights, then those of the state. A new file, synced."""

    def run(on: torch.device) -> Sliced:
        with ExitStack() as stack:
            round = Combination(stack, inputs)
            weights = round.weigh(survey)
            has_state = round.state.header(round.strategy) is not None
            spans = spans_of(round.files.layout, index, of)
            pieces = list(_pieces(round, spans, with_state=has_state))
            size = sum(piece.size for piece in pieces)
            draft = Draft(out, b"", size)
            stack.callback(draft.discard)
            round.state.begin(_Window(draft, [one for one in pieces if one.of_state]))
            window = _Window(draft, [one for one in pieces if not one.of_state])
            round.combine(weights, window, spans, on, thread_count(threads))
            return Sliced(draft.publish(), size, round.recipe(weights), [])

    made, warnings = with_device(device, inputs.strategy, run)
    made.warnings.extend(warnings)
    return made


def join(
    inputs: Inputs, survey: Survey, slices: Sequence[SliceFile], *, out: Path, state_out: Path
) -> Aggregated:
    """Write the weights, and the state if there is one, from all slices in their order; as `aggregate` would.

    `SliceChanged` for the first one that is damaged or was made of other weights.
    """
    with single_threaded_torch(), ExitStack() as stack:
        round = Combination(stack, inputs)
        weights, layout = round.weigh(survey), round.files.layout
        recipe = round.recipe(weights)
        draft = Draft(out, layout.header, layout.size)
        stack.callback(draft.discard)
        new_state = None
        if header := round.state.header(round.strategy):
            new_state = Draft(state_out, *header)
            stack.callback(new_state.discard)
        for index, one in enumerate(slices):
            if one.recipe != recipe:
                raise SliceChanged(index, "was made of other weights")
            spans = spans_of(layout, index, len(slices))
            pieces = list(_pieces(round, spans, with_state=new_state is not None))
            _copy(index, one, pieces, draft, new_state)
        if new_state is not None:
            new_state.publish()
        return Aggregated(
            draft.publish(),
            layout.size,
            len(inputs.updates),
            math.fsum(weights),
            [],
            round.strategy.state_dict(),
        )


def spans_of(layout: Layout, index: int, of: int) -> list[Span]:
    """The numbers of each run that slice `index` makes: all slices together make each number once."""
    data = sum(run.count * run.itemsize for run in layout.runs)
    first, last = data * index // of, data * (index + 1) // of
    spans, before = [], 0
    for run in layout.runs:
        edges = [
            min(run.count, max(0, -(-(edge - before) // run.itemsize))) for edge in (first, last)
        ]
        spans.append((edges[0], edges[1]))
        before += run.count * run.itemsize
    return spans


@dataclass(frozen=True)
class _Piece:
    """Neighbouring bytes: from `first` of the whole file, from `at` of the slice's."""

    first: int
    size: int
    at: int
    of_state: bool


def _pieces(round: Combination, spans: Sequence[Span], *, with_state: bool) -> Iterator[_Piece]:
    at = 0
    runs = round.files.layout.runs
    for run, (first, last) in zip(runs, spans, strict=True):
        size = (last - first) * run.itemsize
        if size:
            yield _Piece(run.offset + first * run.itemsize, size, at, of_state=False)
        at += size
    if not with_state:
        return
    for run, (first, last) in zip(runs, spans, strict=True):
        for place in round.state.places(round.floats.index(run)) if run in round.floats else []:
            size = (last - first) * place.itemsize
            if size:
                yield _Piece(place.offset + first * place.itemsize, size, at, of_state=True)
            at += size


class _Window:
    """Writes at places of a whole file, of which the slice's file holds these pieces."""

    def __init__(self, target: Target, pieces: Sequence[_Piece]) -> None:
        self._target = target
        self._pieces = pieces

    def write(self, data: bytes | memoryview, offset: int) -> None:
        for piece in self._pieces:
            if piece.first <= offset and offset + len(data) <= piece.first + piece.size:
                self._target.write(data, piece.at + offset - piece.first)
                return
        raise ValueError(f"bytes from {offset} on belong to another slice")


def _copy(
    index: int, one: SliceFile, pieces: Sequence[_Piece], weights: Draft, state: Draft | None
) -> None:
    sha = hashlib.sha256()
    try:
        file = one.path.open("rb")
    except FileNotFoundError:
        raise SliceChanged(index, "has disappeared") from None
    with file:
        for piece in pieces:
            target = state if piece.of_state else weights
            done = 0
            while done < piece.size:
                data = file.read(min(CHUNK, piece.size - done))
                if not data or target is None:
                    raise SliceChanged(index, "is too short")
                sha.update(data)
                target.write(data, piece.first + done)
                done += len(data)
        if file.read(1):
            raise SliceChanged(index, "is too long")
    if sha.hexdigest() != one.digest:
        raise SliceChanged(index, "is not what was made")
