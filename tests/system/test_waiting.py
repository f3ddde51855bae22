"""The load test itself, small: clients wait on a production server, and no bound is broken."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.system.processes import ROOT, environment

pytestmark = [pytest.mark.system, pytest.mark.heavy]


def test_sixty_clients_wait_and_twelve_a_round_take_part_without_an_error(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/waiting.py", "--server", "production"]
    size = ["--clients", "60", "--sample", "12", "--rounds", "5", "--idle", "3"]

    done = subprocess.run(
        [*command, *size, "--results", str(tmp_path)],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "waiting-production.json").read_text())
    assert found["errors"] == {}
    assert found["connections"]["waiting"] < 30
    assert len(found["everybody knows"]) == 5  # percentiles, largest, count
    assert found["everybody knows"]["count"] == 4
