"""What the pages name is there: tests, files, links; reference pages come from code. (`make docs` builds the HTML.)"""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from fl_client.webhook import TYPES, sign
from fl_server_ai.aggregation import STRATEGIES
from fl_server_ai.uncertainty import UNCERTAINTY
from fl_server_core.lifecycle import MOVES, NotificationState
from fl_server_core.models.notifications import NotificationType

ROOT = Path(__file__).resolve().parents[2]
TOP = [ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md")]
PAGES = sorted([*TOP, *(p for p in (ROOT / "docs").rglob("*.md") if "_generated" not in p.parts)])
TEST = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")
FILE = re.compile(r"`((?:fl_server|fl_client|benchmarks|docs|deploy)[\w/.-]*\.(?:py|md|sh))")
LINK = re.compile(r"\]\(([^)#\s:]+)(?:#[\w-]+)?\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_is_there(page: Path) -> None:
    text = page.read_text()

    for path, name in TEST.findall(text):
        assert (ROOT / path).exists(), path
        assert not name or f"def {name}(" in (ROOT / path).read_text(), name
    for path in FILE.findall(text):
        assert (ROOT / path).exists(), path
    for target in LINK.findall(text):
        assert (page.parent / target).exists(), target


def test_the_reference_is_made_of_what_the_code_says(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "docs" / "generate.py", tmp_path], check=True)

    def page(name: str) -> str:
        return (tmp_path / name).read_text()

    assert "### POST /api/tasks/{id}/result/" in page("http-api.md")
    assert "| `FL_STAGING_DIR` | `$FL_DATA_DIR/staging` |" in page("settings.md")
    assert "| `FL_SECRET_KEY` | (production: required) |" in page("settings.md")
    assert {f"## {name}" for name in STRATEGIES} <= set(page("strategies.md").splitlines())
    assert {f"## {name}" for name in UNCERTAINTY} <= set(page("uncertainty.md").splitlines())
    assert "| `NON_FINITE` | 422 |" in page("errors.md")
    assert "| `min_updates` | integer, ≥ 1, ≤ 100000 | `1` |" in page("trainer-options.md")
    for included in PAGES:
        for name in re.findall(
            r"^```{include} _generated/(\S+)", included.read_text(), re.MULTILINE
        ):
            assert page(name)


def test_every_message_is_on_the_page_of_webhooks() -> None:
    page = (ROOT / "docs/reference/webhooks.md").read_text()

    assert {f"| `{kind}` |" for kind in TYPES} <= set(
        re.findall(r"^\| `[A-Z_]+` \|", page, re.MULTILINE)
    )
    assert set(NotificationType.values) == TYPES
    snippet: dict[str, Any] = {}
    exec(re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)[0], snippet)  # noqa: S102 - ours
    assert snippet["is_genuine"]("key", "1", sign("key", "1", b"{}"), b"{}")
    assert not snippet["is_genuine"]("key", "2", sign("key", "1", b"{}"), b"{}")


def test_every_state_has_its_place_in_the_pictures(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "docs" / "generate.py", tmp_path], check=True)
    shown = (ROOT / "docs/explanation/life-of-a-round.md").read_text()

    for kind, moves in MOVES.items():
        picture = tmp_path / f"states-{kind.__name__}.svg"
        if kind is NotificationState:  # of interest to nobody but the deliverer
            continue
        assert f"_generated/{picture.name}" in shown
        drawn = ET.parse(picture).getroot()  # noqa: S314 - our own file
        arrows = [e for e in drawn.iter() if e.get("marker-end")]
        assert len(arrows) == sum(len(targets) for targets in moves.values())
