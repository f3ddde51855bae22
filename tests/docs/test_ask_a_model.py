"""The example of the how-to page, run against a server as it stands there."""

import json
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.system.processes import ROOT, environment, started
from tests.system.servers import free_port

pytestmark = pytest.mark.system
EXAMPLE = ROOT / "docs" / "how-to" / "examples" / "ask_a_model.py"


def test_the_example_is_answered(tmp_path: Path) -> None:
    port = free_port()
    base = f"http://127.0.0.1:{port}"
    env = environment(FL_DATA_DIR=str(tmp_path / "data"), FL_OPEN_REGISTRATION="1")
    command = [sys.executable, "manage.py", "serve", "--port", str(port)]
    with started(command, env=env, log=tmp_path / "log", cwd=ROOT) as server:
        server.wait_for("Serving at")
        person = {"username": "ada", "password": "a long pass phrase", "actor": True}
        token = httpx.post(f"{base}/api/users/", json=person).json()["token"]

        said = subprocess.run(
            [sys.executable, EXAMPLE, base, token], capture_output=True, text=True, check=False
        )

        assert said.returncode == 0, said.stderr
        answer = json.loads(said.stdout)
    assert len(answer["inference"]) == 2
    assert all(abs(sum(probabilities) - 1) < 1e-9 for probabilities in answer["inference"])
    assert len(answer["uncertainty"]["mutual_info"]) == 2
