"""Every hostile file is refused with the right code, runs nothing, leaves nothing and costs little memory."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fl_server_ai.containers import extract
from tests.ai.hostile import CORPUS, HONEST, MARKER

ROOT = Path(__file__).parents[2]
MEMORY = 64 * 2**20  # bytes
ARMED = [name for name, file in CORPUS.items() if file.armed]


@dataclass(frozen=True)
class Watched:
    results: dict[str, dict[str, Any]]
    control: list[str]
    log: str
    digests: list[str]  # of the files below a megabyte


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """One process reads all of them, one after another."""
    MARKER.unlink(missing_ok=True)
    folder = tmp_path_factory.mktemp("hostile")
    paths, digests = {}, []
    for index, (name, file) in enumerate(CORPUS.items()):
        place = folder / str(index)
        place.mkdir()
        paths[name] = place / "source"
        data = file.build()
        paths[name].write_bytes(data)
        if len(data) < 2**20:
            digests.append(hashlib.sha256(data).hexdigest())
    job = {"folder": str(folder), "files": [str(path) for path in paths.values()]}

    done = subprocess.run(
        [sys.executable, "-m", "tests.ai.hostile.watched"], input=json.dumps(job) + "\n",
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip

    lines = [json.loads(line) for line in done.stdout.splitlines()]
    control: list[str] = next((line["control"] for line in lines if "control" in line), [])
    by_path = {line["path"]: line for line in lines if "path" in line}
    results = {name: by_path[str(path)] for name, path in paths.items() if str(path) in by_path}
    yield Watched(results, control, done.stderr[-2000:], digests)
    for path in paths.values():
        path.unlink(missing_ok=True)
    assert not MARKER.exists()


@pytest.mark.parametrize("name", CORPUS)
def test_a_hostile_file_is_refused_and_nothing_else_happens(watched: Watched, name: str) -> None:
    assert name in watched.results, f"the reader's process died: {watched.log}"
    found = watched.results[name]

    assert found["code"] in CORPUS[name].codes, found
    assert not found["events"], found
    assert not found["left"], found
    assert found["grown"] < MEMORY, found


def test_no_hostile_file_has_run_anything(watched: Watched) -> None:
    assert watched.results
    assert not MARKER.exists()


def test_the_watch_sees_files_code_commands_and_connections(watched: Watched) -> None:
    seen = [event.split(" ")[0] for event in watched.control]

    for event in (
        "import",
        "exec",
        "os.system",
        "subprocess.Popen",
        "socket.__new__",
        "ctypes.dlopen",
    ):
        assert event in seen, watched.control
    assert any(event.startswith("open ('/etc/hostname'") for event in watched.control)
    compiled = [event for event in watched.control if event.startswith("compile")]
    assert any("1 + 1" in event for event in compiled)
    assert not any("(1, 2)" in event for event in compiled), "a literal is no code"


@pytest.fixture(scope="module")
def fired(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bool]:
    """What Python's own pickle makes of those that are armed, in a process of its own."""
    folder = tmp_path_factory.mktemp("armed")
    paths = {}
    for index, name in enumerate(ARMED):
        paths[name] = folder / str(index)
        paths[name].write_bytes(CORPUS[name].build())
    answer = folder / "answer"
    job = {
        "marker": str(MARKER), "answer": str(answer), "files": [str(path) for path in paths.values()],
    }  # fmt: skip

    subprocess.run(
        [sys.executable, "-m", "tests.ai.hostile.armed"], input=json.dumps(job) + "\n",
        capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip

    found = json.loads(answer.read_text())
    return {name: found[str(path)] for name, path in paths.items()}


@pytest.mark.parametrize("name", ARMED)
def test_an_armed_file_would_run_its_command_if_it_were_unpickled(
    fired: dict[str, bool], name: str
) -> None:
    assert fired[name]


@pytest.mark.parametrize("name", HONEST)
def test_the_honest_files_that_the_hostile_ones_are_made_of_are_read(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / "source").write_bytes(HONEST[name]())

    found = extract(tmp_path / "source", tmp_path / "target")

    assert [tensor.name for tensor in found.manifest.tensors] == ["w"]


def test_there_are_many_and_each_is_another(watched: Watched) -> None:
    assert len(CORPUS) >= 75
    assert len(set(watched.digests)) == len(watched.digests)
