"""What the pages name is there: tests, files, links; and the HTML builds without a warning."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_the_html_builds_without_a_warning(tmp_path: Path) -> None:
    sphinx = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]

    done = subprocess.run(
        [*sphinx, "-d", str(tmp_path / "trees"), "docs", str(tmp_path / "html")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    html = (tmp_path / "html" / "reference" / "http-api.html").read_text()
    assert "/api/tasks/{id}/result/" in html
    assert "FL_DATA_DIR" in (tmp_path / "html" / "reference" / "settings.html").read_text()
    assert "MiddleHalf" in (tmp_path / "html" / "how-to" / "add-an-aggregator.html").read_text()
