"""Sphinx: Markdown in, HTML out. What can be generated is, by `generate.py`, into reference/_generated."""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
# A process of its own: Django's settings are set up there, with nothing of the caller's.
subprocess.run(  # noqa: S603 - our own file
    [sys.executable, HERE / "generate.py", HERE / "reference" / "_generated"], check=True
)

project = "FL server"
author = "the FL server's contributors"
project_copyright = author
html_title = project
html_theme = "furo"
html_static_path: list[str] = []
templates_path: list[str] = []

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "reference/_generated"]
myst_heading_anchors = 3

nitpicky = True
# The web is not asked for others' names; the transport is not for users.
nitpick_ignore_regex = [("py:.*", r"(?!fl_client\.).*"), ("py:class", r"fl_client\.transport\..*")]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_use_unqualified_type_names = True
