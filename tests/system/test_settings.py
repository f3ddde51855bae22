"""Settings that can't be used are named in one line; asking for help leaves nothing behind."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.system.processes import ROOT, environment
from tests.system.servers import free_port

pytestmark = pytest.mark.system


def manage(folder: Path, *arguments: str, **values: str) -> subprocess.CompletedProcess[str]:
    """`manage.py` in a folder of its own."""
    return subprocess.run(
        [sys.executable, str(ROOT / "manage.py"), *arguments],
        cwd=folder,
        env=environment(**values),
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("FL_POLL_SECONDS", "soon", "set it to a whole number, like 25"),
        ("FL_OPEN_REGISTRATION", "ture", "set it to 1 or 0"),
        ("FL_RATE_UPLOADS", "many", "set it to a rate like 3000/m"),
        ("FL_LOG_LEVEL", "loud", "set it to one of DEBUG, INFO"),
        ("FL_DATABASE_URL", "postgres//ada:s3cret@host", "postgres://user:password@host/name"),
        ("FL_SECRET_KEY_FILE", "/no/such/file", "can't be read: No such file"),
        ("FL_DATA_DIR", "/dev/null/data", "set FL_DATA_DIR to a folder that you may write"),
    ],
)
def test_a_setting_that_cannot_be_used_is_named_in_one_line(
    tmp_path: Path, name: str, value: str, said: str
) -> None:
    done = manage(tmp_path, "serve", **{name: value})

    assert done.returncode == 1
    assert done.stderr.startswith(f"manage.py: {name}")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert "s3cret" not in done.stderr


def test_a_required_setting_is_asked_for_in_one_line(tmp_path: Path) -> None:
    done = manage(tmp_path, "migrate", DJANGO_SETTINGS_MODULE="fl_server.settings.production")

    assert done.stderr.startswith("manage.py: set FL_SECRET_KEY")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [["serve", "--help"], ["help", "serve"], ["--version"]], ids=str
)
def test_asking_for_help_leaves_nothing_behind(tmp_path: Path, arguments: list[str]) -> None:
    done = manage(tmp_path, *arguments)

    assert done.returncode == 0
    assert done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_web_whose_application_cannot_be_loaded_ends_and_says_why(tmp_path: Path) -> None:
    broken = "from fl_server.settings.embedded import *\nINSTALLED_APPS = ['nowhere_to_be_found']\n"
    (tmp_path / "broken.py").write_text(broken)
    env = environment(DJANGO_SETTINGS_MODULE="broken", FL_DATA_DIR=str(tmp_path / "data"))
    env["PYTHONPATH"] += f":{tmp_path}"

    done = subprocess.run(
        [sys.executable, "-m", "fl_server.front", "--bind", f"127.0.0.1:{free_port()}"],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert done.returncode == 3
    assert "the application can't be loaded; the web stops" in done.stderr
    assert "nowhere_to_be_found" in done.stderr
