"""The strategy that the how-to page shows keeps the promises of every strategy, and its own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "docs" / "how-to" / "examples"
MEDIAN_OF_FOUR = """
import torch
from middle_half import MiddleHalf, MiddleHalfOptions

rows = torch.tensor([[1.0, -9.0], [2.0, 4.0], [4.0, 6.0], [1e9, 5.0]], dtype=torch.bfloat16)
assert MiddleHalf().reduce(rows).tolist() == [3.0, 4.5]
assert MiddleHalf(MiddleHalfOptions(trim=0.0)).reduce(rows[:2]).tolist() == [1.5, -2.5]
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
    said = run("-m", "pytest", "-p", "middle_half", "-v", "tests/ai/test_plugins.py")

    assert said.count("[MiddleHalf]") >= 5


def test_the_example_averages_the_middle_half() -> None:
    run("-c", MEDIAN_OF_FOUR)
