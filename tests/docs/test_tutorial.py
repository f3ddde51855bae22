"""The tutorial and the client in bash work as written, against a real server."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import fl_client
from demo.processes import Federation

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SAVED = re.compile(r"as\s+`(\w+\.py)`")

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """`FL_OPEN_REGISTRATION=1 manage.py serve`, on a port of its own."""
    with Federation(tmp_path_factory.mktemp("served")) as federation:
        federation.serve("only for this test")
        yield federation


def script(page: Path) -> str:
    """A page's commands, and its files written where the page says so, in order."""
    text = page.read_text()
    lines = ["set -euo pipefail"]
    end = 0
    for block in BLOCK.finditer(text):
        if block[1] == "bash":
            lines.append(block[2])
        else:
            name = SAVED.findall(text[end : block.start()])[-1]
            lines.append(f"cat >{name} <<'END_OF_FILE'\n{block[2]}END_OF_FILE")
        end = block.end()
    return "\n".join(lines)


def run(folder: Path, command: list[str], **environment: str) -> str:
    bin_folder = Path(sys.executable).parent
    done = subprocess.run(
        command,
        cwd=folder,
        env={
            "PATH": f"{bin_folder}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "HOME": str(folder),
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_command_of_the_tutorial_works(tmp_path: Path, server: Federation) -> None:
    folder = tmp_path / "reader"
    folder.mkdir()
    commands = script(DOCS / "tutorials" / "first-training.md")

    said = run(folder, ["bash", "-c", commands.replace("http://127.0.0.1:8000", server.url)])

    assert '"kind": "train"' in said
    assert '"identifier": "aggregated"' in said
    assert "round 10: mse" in said
    assert re.search(r"slope \[(2\.9|3\.0)", said)


def test_the_bash_client_takes_part_until_the_end(tmp_path: Path, server: Federation) -> None:
    with fl_client.connect(server.url) as fl:
        actor = fl.users.register("actor", "a good long passphrase", actor=True)
        site = fl.users.register("site", "another long passphrase", client=True)
    train, evaluate = tmp_path / "train", tmp_path / "evaluate"
    train.write_text('#!/bin/bash\ngrep -q \'"lr": 0.5\' "$3" && cp "$1" "$2" && echo 7\n')
    evaluate.write_text('#!/bin/bash\ngrep -q rounds "$2" && echo 7 accuracy=0.5 loss=1.25\n')
    train.chmod(0o755)
    evaluate.chmod(0o755)
    with fl_client.connect(server.url, token=actor["token"]) as fl:
        model = fl.models.upload(
            name="m", description="", weights={"w": np.ones((2, 3), np.float32)}
        )
        training = fl.trainings.create(
            model=model,
            rounds=2,
            clients=[site["id"]],
            metric_names=["accuracy", "loss"],
            options={"client_config": {"lr": 0.5}},
        )
        training.start()

        said = run(
            tmp_path,
            ["bash", str(DOCS / "how-to" / "examples" / "client.sh")],
            URL=server.url,
            TOKEN=site["token"],
            TRAIN=str(train),
            EVALUATE=str(evaluate),
        )

        assert said.count("train done") == 2
        assert said.count("evaluate done") == 2
        assert training.get()["state"] == "C"
        means = {r["key"]: r["value_float"] for r in training.metrics() if r["reporter"] is None}
        assert means == {"accuracy": 0.5, "loss": 1.25}
        assert np.array_equal(fl.models.weights(model)["w"], np.ones((2, 3)))


@pytest.mark.parametrize(
    ("example", "method"), [("small_updates.py", "FedAvg"), ("scaffold_site.py", "SCAFFOLD")]
)
def test_the_example_sites_learn_their_line(
    tmp_path: Path, server: Federation, example: str, method: str
) -> None:
    with fl_client.connect(server.url) as fl:
        name = example.partition(".")[0]
        actor = fl.users.register(f"{name}-actor", "a good long passphrase", actor=True)
        site = fl.users.register(name, "another long passphrase", client=True)
    start = {"slope": np.zeros(1, np.float32), "offset": np.zeros(1, np.float32)}
    with fl_client.connect(server.url, token=actor["token"]) as fl:
        model = fl.models.upload(name=name, description="", weights=start)
        training = fl.trainings.create(
            model=model, rounds=2, clients=[site["id"]], aggregation_method=method
        )
        training.start()

        said = run(
            tmp_path,
            [
                sys.executable,
                str(DOCS / "how-to" / "examples" / example),
                server.url,
                site["token"],
            ],
        )

        assert "'training_state': 'C'" in said
        weights = fl.models.weights(model)
        spread = np.square(np.linspace(-1, 1, 50)).mean()  # one site: 20 steps of plain descent
        assert weights["slope"].item() == pytest.approx(3 - 3 * (1 - 0.1 * spread) ** 20, abs=0.01)
        assert weights["offset"].item() == pytest.approx(0.9**20 - 1, abs=0.01)
