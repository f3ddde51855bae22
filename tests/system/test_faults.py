"""`kill -9` of everything, everywhere: trainings end by themselves, with the same bytes and nothing counted twice."""

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.faults.losses import SHARED_BYTES
from tests.system.faults.schedule import FEW_POINTS, STACKS, Run
from tests.system.faults.stacks import Stack
from tests.system.processes import until
from tests.system.sites import Cohort, digest, expected, model

AGGREGATING = "aggregation.written"


@pytest.fixture(
    scope="module", params=["production", pytest.param("embedded", marks=pytest.mark.heavy)]
)
def up(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Stack]]:
    """A stack that both tests of `make test` use: to start it takes longer than to kill it."""
    kind = str(request.param)
    stack = STACKS[kind](tmp_path_factory.mktemp(kind), FL_EVENT_ATTEMPTS="3")
    with stack.up():
        yield kind, stack


@pytest.mark.system
def test_a_few_kills_change_no_bit(up: tuple[str, Stack]) -> None:
    kind, stack = up
    run = Run(kind, seed=1, count=0, stack=stack, short=True)

    run.run()

    assert len(run.done) == len(run.faults)
    assert {target for fault in run.faults for target in fault.targets} == set(stack.targets)
    assert set(FEW_POINTS) <= {point for point, _ in stack.traps.fired()}


@pytest.mark.faults
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("kind", STACKS)
def test_many_kills_change_no_bit(kind: str, tmp_path: Path) -> None:
    seed = int(os.environ.get("FL_FAULTS_SEED") or secrets.randbelow(10**6))
    count = int(os.environ.get("FL_FAULTS") or 200) // len(STACKS)
    stack = STACKS[kind](tmp_path, FL_SHARED_ROUND_BYTES=str(SHARED_BYTES))

    with stack.up():
        report = Run(kind, seed=seed, count=count, stack=stack).run()

    print(f"\n{report}")  # noqa: T201
    assert "NEVER" not in report


@pytest.mark.system
def test_a_worker_that_dies_three_times_on_an_aggregation_ends_that_training_alone(
    up: tuple[str, Stack],
) -> None:
    _, stack = up
    start = model(100)

    doomed = Cohort.gather(stack.base, start, sites=1, rounds=1, prefix="doomed-")
    stack.traps.arm(AGGREGATING)
    thread = doomed.sites[0].start()
    for death in (1, 2, 3):
        until(lambda: not stack.traps.armed, f"death {death} of the worker", 120)
        if death < 3:
            stack.traps.arm(AGGREGATING)
    until(lambda: doomed.state == "E", "the end of the training", 120)
    thread.join(60)
    reason = doomed.reason
    after = Cohort.gather(stack.base, start, sites=2, rounds=1, prefix="after-")
    after.run()

    assert reason.startswith("WORKER_LOST: TrainingRoundFinished, 3 attempts")
    assert "killed, or out of memory" in reason
    assert doomed.sites[0].final is not None
    assert doomed.sites[0].final["training_state"] == "E"
    assert after.state == "C"
    assert digest(after.weights()) == digest(expected(start, sites=2, rounds=1))
