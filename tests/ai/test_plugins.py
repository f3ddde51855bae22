"""Plug-ins from files and packages: found, checked, and left out one by one with a reason."""

import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from django.core.management import CommandError, call_command

from fl_server_ai.aggregation import STRATEGIES
from fl_server_ai.checks import plugin_faults, plugins_check
from fl_server_core import plugins
from fl_server_core.plugins import torch_line

OWN = list(STRATEGIES)
GOOD = """
from fl_server_ai.aggregation import STRATEGIES, Strategy

@STRATEGIES.register("Halfway")
class Halfway(Strategy):
    paper = "1602.05629"
"""
HEAD = """from dataclasses import dataclass, field
from fl_server_ai.aggregation import STRATEGIES, Strategy, UpdateMeta
"""


@pytest.fixture
def drop(tmp_path: Path, caplog) -> Iterator[Callable[[str, str], Path]]:
    """Put a file into the plug-in folder; nothing of it is left afterwards."""
    caplog.set_level(logging.CRITICAL, "fl.server")
    plugins.use_folder(tmp_path)

    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        plugins.use_folder(tmp_path)
        return path

    yield write
    plugins.use_folder(None)
    for name in set(STRATEGIES) - set(OWN):
        del STRATEGIES._items[name]
    for name in [name for name in sys.modules if name.startswith(plugins.PREFIX)]:
        del sys.modules[name]


def test_a_file_in_the_folder_is_there_by_name(drop) -> None:
    drop("halfway.py", GOOD)

    assert "Halfway" in STRATEGIES
    assert plugin_faults() == []


def test_other_files_are_left_alone(drop) -> None:
    drop("_halfway.py", "1 / 0")
    drop(".halfway.py", "1 / 0")
    drop("halfway.txt", "1 / 0")

    assert plugin_faults() == []


BROKEN = {
    "syntax": ("x = 1\ndef f(:\n", 2, "SyntaxError"),
    "an exception": ("\n\n1 / 0\n", 3, "ZeroDivisionError: division by zero"),
    "the exit": ("import sys\nsys.exit(3)\n", 2, "SystemExit: 3"),
    "torch": ("import os\n\nimport torch.nn\n", 3, "imports torch, which the web process"),
    "torch in a branch": ("try:\n    from torch import Tensor\nfinally: pass\n", 2, "TYPE_CHECKING"),
    "a name of ours": (HEAD + "@STRATEGIES.register('FedAvg')\nclass A(Strategy): ...\n", 3,
                       "'FedAvg' is already registered by fl_server_ai.aggregation.strategies.fed_avg"),
    "no strategy": (HEAD + "@STRATEGIES.register('A')\nclass A: ...\n", 0, "no class below"),
    "options that thaw": (
        HEAD + "@dataclass\nclass O:\n    a: int = 1\n"
        "@STRATEGIES.register('A')\nclass A(Strategy):\n    Options = O\n", 0,
        "A.Options is no frozen dataclass",
    ),
    "options of strange types": (
        HEAD + "@dataclass(frozen=True)\nclass O:\n    a: complex = 1j\n"
        "@STRATEGIES.register('A')\nclass A(Strategy):\n    Options = O\n", 0,
        "A can't be described or made with defaults: KeyError",
    ),
    "options without default": (
        HEAD + "@dataclass(frozen=True)\nclass O:\n    a: int\n"
        "@STRATEGIES.register('A')\nclass A(Strategy):\n    Options = O\n", 0,
        "A: the option 'a' needs a default",
    ),
    "an extra of ours": (
        "from fl_server_ai.aggregation import STRATEGIES, Extra, Strategy\n"
        "@STRATEGIES.register('A')\nclass A(Strategy):\n"
        "    def extras(self): return (Extra('fl.loss', 'the loss'),)\n", 0,
        "A: the extra 'fl.loss' is in the namespace 'fl', which is reserved",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_file_is_left_out_with_file_line_and_reason(drop, what: str) -> None:
    text, line, said = BROKEN[what]
    path = drop("broken.py", text)
    drop("halfway.py", GOOD)

    faults = plugin_faults()

    assert len(faults) == 1
    assert faults[0].startswith(f"{path}:{line}: " if line else f"{path}: ")
    assert said in faults[0]
    assert sorted(STRATEGIES) == sorted([*OWN, "Halfway"])


def test_of_a_file_that_breaks_half_way_nothing_is_left(drop) -> None:
    drop("half.py", GOOD + "\n1 / 0\n")

    assert len(plugin_faults()) == 1
    assert "Halfway" not in STRATEGIES


def test_of_two_files_with_one_name_the_second_is_left_out(drop) -> None:
    drop("a.py", GOOD)
    drop("b.py", GOOD)

    (fault,) = plugin_faults()

    assert "b.py" in fault
    assert "'Halfway' is already registered by fl_plugins_a" in fault


def test_an_option_that_every_training_has_is_refused(drop) -> None:
    drop(
        "hidden.py",
        HEAD + "@dataclass(frozen=True)\nclass O:\n    include: int = 1\n"
        "@STRATEGIES.register('A')\nclass A(Strategy):\n    Options = O\n",
    )

    assert plugin_faults() == [
        "strategy A: its option 'include' is one that every training has; rename it"
    ]


def test_a_file_that_everybody_may_write_is_not_run(drop) -> None:
    path = drop("halfway.py", GOOD)
    path.chmod(0o666)

    (fault,) = plugin_faults()

    assert "everybody on this machine may write" in fault
    assert "Halfway" not in STRATEGIES


def test_a_folder_that_is_missing_is_said(tmp_path: Path, drop) -> None:
    plugins.use_folder(tmp_path / "nowhere")

    (fault,) = plugin_faults()

    assert fault.startswith("FL_PLUGIN_DIR: ")


def test_the_system_check_stops_commands(drop) -> None:
    drop("broken.py", "1 / 0\n")

    (error,) = plugins_check()

    assert error.id == "fl_server.E001"
    with pytest.raises(CommandError, match=r"broken.py:1: ZeroDivisionError"):
        call_command("check")


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\n", 0),
        ("import typing\nif typing.TYPE_CHECKING:\n    import torch\nelse:\n    import torch\n", 5),
        ("def f():\n    import torch\n", 0),
        ("class A:\n    import torch.nn\n", 2),
        ("import torchless\nfrom . import torch\n", 0),
        ("import os, torch as t\n", 1),
    ],
)
def test_imports_of_torch_are_found_where_they_count(source: str, line: int) -> None:
    assert torch_line(source.encode(), "x.py") == line


PACKAGE = """
import sys
sys.path.insert(0, sys.argv[1])
from fl_server_ai.aggregation import STRATEGIES
from fl_server_core.plugins import faults
print(*[fault for fault in faults()] if "Halfway" in STRATEGIES else faults(), sep="\\n")
sys.exit("torch" in sys.modules and not faults())
"""


PYPROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "halfway"
version = "1.0"

[project.entry-points."fl_server_ai.aggregation.strategies"]
Halfway = "halfway"
heavy = "heavy"

[tool.setuptools]
py-modules = ["halfway", "heavy"]
"""
INSTALL = [
    "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--no-build-isolation",
    "--disable-pip-version-check", "--target",
]  # fmt: skip


def test_packages_are_found_by_entry_point_and_torch_is_noticed(tmp_path: Path) -> None:
    """Built and installed by pip; in a process without torch, as the web is."""
    package, site = tmp_path / "package", tmp_path / "site"
    package.mkdir()
    (package / "pyproject.toml").write_text(PYPROJECT)
    (package / "halfway.py").write_text(GOOD)
    (package / "heavy.py").write_text("import torch\n" + GOOD.replace("Halfway", "Heavy"))
    subprocess.run([sys.executable, "-m", *INSTALL, str(site), str(package)], check=True)
    (site / "torch").mkdir()  # stands for the real one, which takes seconds
    (site / "torch" / "__init__.py").write_text("")

    done = subprocess.run(
        [sys.executable, "-c", PACKAGE, str(site)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines() == [
        "entry point heavy = heavy: something that it imports imports torch, which the web process "
        "must not load; import that where it is used, inside a method"
    ]


def test_strategies_load_without_torch() -> None:
    code = (
        "import sys; from fl_server_ai.aggregation import STRATEGIES, options; list(STRATEGIES); "
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )

    done = subprocess.run([sys.executable, "-c", code], check=False)

    assert done.returncode == 0


def test_the_strategies_that_are_promised_are_there() -> None:
    promised = """FedAvg FedAvgM FedAdagrad FedAdam FedYogi FedProx FedNova SCAFFOLD FedDyn qFedAvg FedDGGA
        FedBuff FedAsync IIADMM ICEADMM FedMedian TrimmedMean Krum MultiKrum Bulyan GeometricMedian
        NormClipping CenteredClipping FLTrust AdaptiveZeroing FedSGD FedPM FedDC"""

    assert set(promised.split()) <= set(OWN)
