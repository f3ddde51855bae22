"""The strategy that the how-to page shows is short, keeps the promises of every strategy, and its own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "docs" / "how-to" / "examples"
MEDIAN_OF_FOUR = """
import torch
from fl_server_ai.aggregation import Refused, UpdateMeta
from middle_half import MiddleHalf, MiddleHalfOptions

rows = torch.tensor([[1.0, -9.0], [2.0, 4.0], [4.0, 6.0], [1e9, 5.0]], dtype=torch.bfloat16)
assert MiddleHalf().reduce(rows).tolist() == [3.0, 4.5]
assert MiddleHalf(MiddleHalfOptions(trim=0.0)).reduce(rows[:2]).tolist() == [1.5, -2.5]
assert MiddleHalf().check(UpdateMeta("a", 1), {}) == Refused("one example is no data set")
assert MiddleHalf().check(UpdateMeta("a", 2), {}) is None
"""


def run(*command: str) -> str:
    """In a process of its own, so that the example is registered for nobody else."""
    path = os.pathsep.join([str(EXAMPLES), str(ROOT)])
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "FL_TEST_DB": "sqlite"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_example_keeps_the_promises_of_every_strategy() -> None:
    said = run("-m", "fl_server_ai.testing", "middle_half:MiddleHalf", '{"trim": 0}')

    assert "MiddleHalf: 15 of 15 promises kept" in said


def test_the_example_averages_the_middle_half() -> None:
    run("-c", MEDIAN_OF_FOUR)


def test_the_example_is_short() -> None:
    assert len((EXAMPLES / "middle_half.py").read_text(encoding="utf-8").splitlines()) < 30
