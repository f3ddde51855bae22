"""`kill -9` of everything, everywhere: trainings end by themselves, with the same bytes and nothing counted twice."""

import os
import secrets
from pathlib import Path

import pytest

from tests.system.faults.schedule import STACKS, Run
from tests.system.processes import until
from tests.system.sites import Cohort, digest, expected, model

AGGREGATING = "aggregation.written"


@pytest.mark.system
@pytest.mark.parametrize("kind", STACKS)
def test_a_few_kills_change_no_bit(kind: str, tmp_path: Path) -> None:
    run = Run(kind, seed=1, count=5, folder=tmp_path)

    report = run.run()

    assert len(run.done) == 5
    assert "NEVER" not in report


@pytest.mark.faults
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("kind", STACKS)
def test_many_kills_change_no_bit(kind: str, tmp_path: Path) -> None:
    seed = int(os.environ.get("FL_FAULTS_SEED") or secrets.randbelow(10**6))
    count = int(os.environ.get("FL_FAULTS") or 200) // len(STACKS)
    run = Run(kind, seed=seed, count=count, folder=tmp_path)

    report = run.run()

    print(f"\n{report}")  # noqa: T201
    assert "NEVER" not in report


@pytest.mark.system
@pytest.mark.parametrize("kind", STACKS)
def test_a_worker_that_dies_three_times_on_an_aggregation_ends_that_training_alone(
    kind: str, tmp_path: Path
) -> None:
    stack = STACKS[kind](tmp_path, FL_EVENT_ATTEMPTS="3")
    start = model(100)

    with stack.up():
        doomed = Cohort.gather(stack.base, start, sites=1, rounds=1, prefix="doomed-")
        stack.traps.arm(AGGREGATING)
        thread = doomed.sites[0].start()
        for death in (1, 2, 3):
            until(lambda: not stack.traps.armed, f"death {death} of the worker", 120)
            if death < 3:
                stack.traps.arm(AGGREGATING)
        until(lambda: doomed.state == "E", "the end of the training", 120)
        thread.join(60)
        (reason,) = stack.rows("SELECT reason FROM fl_server_core_training")[0]
        after = Cohort.gather(stack.base, start, sites=2, rounds=1, prefix="after-")
        after.run()

        assert str(reason).startswith("WORKER_LOST: TrainingRoundFinished, 3 attempts")
        assert "killed, or out of memory" in str(reason)
        assert doomed.sites[0].final is not None
        assert doomed.sites[0].final["training_state"] == "E"
        assert after.state == "C"
        assert digest(after.weights()) == digest(expected(start, sites=2, rounds=1))
