"""The example of the how-to page, run against a server as it stands there."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.system.processes import ROOT, environment, started
from tests.system.servers import free_port

pytestmark = pytest.mark.system
EXAMPLES = ROOT / "docs" / "how-to" / "examples"


def test_the_examples_are_answered(tmp_path: Path) -> None:
    picture = tmp_path / "picture.jpg"
    Image.linear_gradient("L").save(picture)
    port = free_port()
    base = f"http://127.0.0.1:{port}"
    env = environment(FL_DATA_DIR=str(tmp_path / "data"), FL_OPEN_REGISTRATION="1")
    command = [sys.executable, "manage.py", "serve", "--port", str(port)]
    with started(command, env=env, log=tmp_path / "log", cwd=ROOT) as server:
        server.wait_for("Serving at")
        person = {"username": "ada", "password": "a long pass phrase", "actor": True}
        token = httpx.post(f"{base}/api/users/", json=person).json()["token"]

        answer = said("ask_a_model.py", base, token)
        of_picture = said("ask_with_an_image.py", base, token, str(picture))

    assert len(answer["inference"]) == 2
    assert all(abs(sum(probabilities) - 1) < 1e-9 for probabilities in answer["inference"])
    assert len(answer["uncertainty"]["mutual_info"]) == 2
    assert len(of_picture["inference"][0]) == 2


def said(name: str, *arguments: str) -> Any:
    command = [sys.executable, EXAMPLES / name, *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment()
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
