"""Kill points: named once, used where they are named, deadly only when a test has armed them."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.test import override_settings

from fl_server_core.killpoints import COMMITS, POINTS, STEPS, reached, refuse_in_production

ROOT = Path(__file__).resolve().parents[2]
CODE = [path for top in ROOT.glob("fl_server*") for path in top.rglob("*.py")]
PROGRAM = """
import os, sys
from pathlib import Path
from django.conf import settings
settings.configure(FL_KILL_POINTS=Path(sys.argv[1]))
from fl_server_core.killpoints import around
for _ in range(int(sys.argv[2])):
    with around("wake"):
        pass
if sys.argv[3:] and os.fork() == 0:
    with around("sweep"):
        pass
    os._exit(0)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("armed", "fired", "hits"):
        (tmp_path / name).mkdir()
    return tmp_path


def ran(folder: Path, times: int, *more: str) -> int:
    command = [sys.executable, "-c", PROGRAM, str(folder), str(times), *more]
    return subprocess.run(command, cwd=ROOT, timeout=60).returncode


def hits(folder: Path) -> list[list[str]]:
    return [path.read_text().splitlines()[1:] for path in (folder / "hits").iterdir()]


def test_an_armed_point_kills_at_the_nth_hit_and_only_once(folder: Path) -> None:
    (folder / "armed" / "wake:after").write_text("2")

    codes = [ran(folder, 2), ran(folder, 2), ran(folder, 2)]

    assert codes == [0, -signal.SIGKILL, 0]
    assert sorted(map(len, hits(folder))) == [2, 4, 4]
    (fired,) = (folder / "fired").iterdir()
    assert fired.name.startswith("wake:after@")


def test_a_forked_process_keeps_a_list_of_its_own(folder: Path) -> None:
    ran(folder, 1, "fork")

    assert sorted(hits(folder)) == [["sweep:before", "sweep:after"], ["wake:before", "wake:after"]]


def test_nothing_is_counted_where_no_folder_is_set() -> None:
    assert settings.FL_KILL_POINTS is None

    reached("no such point, and nobody minds")


def test_an_undeclared_point_is_an_error_in_an_armed_run(folder: Path, settings) -> None:
    settings.FL_KILL_POINTS = folder

    with pytest.raises(KeyError, match="not declared"):
        reached("no such point")


@pytest.mark.parametrize("name", ["base", "embedded", "production"])
def test_no_shipped_settings_can_be_told_to_arm_them(name: str, folder: Path) -> None:
    source = (ROOT / "fl_server" / "settings" / f"{name}.py").read_text()
    module = f"fl_server.settings.{name}"

    assert "env" not in "".join(re.findall(r"FL_KILL_POINTS.*?(?=  #|\n)", source))
    with (
        override_settings(SETTINGS_MODULE=module, FL_KILL_POINTS=folder),
        pytest.raises(ImproperlyConfigured, match="for tests"),
    ):
        refuse_in_production()


def test_every_point_that_is_declared_is_in_the_code_and_the_other_way_round() -> None:
    text = "\n".join(path.read_text() for path in CODE if path.name != "killpoints.py")
    answers = set(re.findall(r'"(answer\.\w+)"', text))

    named = set(re.findall(r'(?<!\.)reached\("([^"]+)"\)', text))
    named |= {
        f"{step}:{side}"
        for step in {*re.findall(r'(?:around|_send)\("([^"]+)"', text), *answers}
        for side in ("before", "after")
    }
    named |= {
        f"{step}.commit:{side}"
        for step in re.findall(r'committing\("([^"]+)"\)', text)
        for side in ("before", "after")
    }

    assert named == POINTS
    assert len(POINTS) == len(named)
    assert len({*COMMITS, *STEPS}) == len(COMMITS) + len(STEPS)


def test_every_point_is_explained_once() -> None:
    page = (ROOT / "docs" / "explanation" / "crash-safety.md").read_text()
    rows = page.partition("| killed at |")[2].splitlines()

    explained = [
        name
        for row in rows
        for name in re.findall(
            r"`([\w.]+:\w+|[\w.]+)`", row.split("|")[1] if row.startswith("| `") else ""
        )
    ]

    assert sorted(explained) == sorted(POINTS)
